"""Attention of a tree on a CPU: torch's fused kernel runs on prompts and completions separately."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpo.models.cpu.linear import sum_dtype
from grpo.models.tree import Tree, pad_parts, unpad_parts

# The fused kernel runs on each part of the keys, and the parts are combined by their log-sum-exp.
# With the log-sum-exp of all keys, a part's backward gives the gradient of the whole (as in ring
# attention, 2310.01889), because the kernel computes probabilities as e^(score - log-sum-exp).
flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def has_fused_kernel(x: Tensor) -> bool:
    """Returns whether torch has a kernel that returns the log-sum-exp of scores: only on a CPU."""
    return x.device.type == "cpu"


def attend_split(
    queries_HTd: Tensor, keys_KTd: Tensor, values_KTd: Tensor, tree: Tree, scale: float
) -> Tensor:
    """Returns a tree's attention [T, H, d], for layers without window and soft cap."""
    out: Tensor = SplitAttention.apply(  # type: ignore[no-untyped-call]
        queries_HTd, keys_KTd, values_KTd, tree, scale
    )
    return out


class SplitAttention(torch.autograd.Function):
    """Computes attention of prompts, of completions to their prompt, and within completions.

    Keeps queries, keys, values, the output and a log-sum-exp for each head and token. Parts are
    combined and gradients added up in fp32 or better, whatever the precision of the products.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries_HTd: Tensor,
        keys_KTd: Tensor,
        values_KTd: Tensor,
        tree: Tree,
        scale: float,
    ) -> Tensor:
        heads, tokens, width = queries_HTd.shape
        sums = sum_dtype(queries_HTd)
        whole_THd = queries_HTd.new_empty(tokens, heads, width, dtype=sums)
        out_HTd = whole_THd.transpose(0, 1)
        normalizer_HT = queries_HTd.new_empty(heads, tokens, dtype=sums)
        qkv = QKVSlices(queries_HTd, keys_KTd, values_KTd)
        for prompt, group in zip(tree.prompt_slices, tree.group_slices, strict=True):
            out_HTd[:, prompt], normalizer_HT[:, prompt] = qkv.attend_slices(
                prompt, prompt, True, scale
            )
            if group.stop > group.start:
                out_HTd[:, group], normalizer_HT[:, group] = qkv.attend_slices(
                    group, prompt, False, scale
                )
        rows = [part for part in tree.completion_slices if part.stop > part.start]
        if rows:
            all_rows = slice(rows[0].start, rows[-1].stop)
            out, normalizer = flash_attention(*qkv.pad_parts(rows), is_causal=True, scale=scale)
            row_out_HTd = unpad_parts(out, rows)
            row_HT = unpad_parts(normalizer[..., None], rows)[..., 0]
            prompt_HT = normalizer_HT[:, all_rows]
            total_HT = torch.logaddexp(prompt_HT, row_HT)
            out_HTd[:, all_rows] *= (prompt_HT - total_HT).exp_()[..., None]
            out_HTd[:, all_rows] += row_out_HTd.to(sums).mul_((row_HT - total_HT).exp_()[..., None])
            normalizer_HT[:, all_rows] = total_HT
        out_THd = whole_THd.to(queries_HTd.dtype)
        ctx.save_for_backward(queries_HTd, keys_KTd, values_KTd, out_THd, normalizer_HT)
        ctx.tree, ctx.scale = tree, scale
        return out_THd

    @staticmethod
    def backward(ctx: Any, grad_THd: Tensor) -> tuple[Tensor | None, ...]:
        queries_HTd, keys_KTd, values_KTd, out_THd, normalizer_HT = ctx.saved_tensors
        tree, scale = ctx.tree, ctx.scale
        qkv = QKVSlices(queries_HTd, keys_KTd, values_KTd)
        grad_HTd, out_HTd = grad_THd.transpose(0, 1), out_THd.transpose(0, 1)
        inputs = (queries_HTd, keys_KTd, values_KTd)
        grads = QKVSlices(*(torch.zeros_like(x, dtype=sum_dtype(x)) for x in inputs))
        for prompt, group in zip(tree.prompt_slices, tree.group_slices, strict=True):
            for part, causal in ((prompt, True), (group, False)):
                if part.stop > part.start:
                    part_grads = flash_attention_backward(
                        grad_HTd[None, :, part], *qkv.select_slices(part, prompt),
                        out_HTd[None, :, part], normalizer_HT[None, :, part],
                        0.0, causal, scale=scale,
                    )  # fmt: skip
                    grads.accumulate_gradients(part, prompt, *(x[0] for x in part_grads))
        rows = [part for part in tree.completion_slices if part.stop > part.start]
        if rows:
            all_rows = slice(rows[0].start, rows[-1].stop)
            row_grads = flash_attention_backward(
                pad_parts(grad_HTd, rows), *qkv.pad_parts(rows), pad_parts(out_HTd, rows),
                pad_parts(normalizer_HT[..., None], rows)[..., 0], 0.0, True, scale=scale,
            )  # fmt: skip
            grads.accumulate_gradients(
                all_rows, all_rows, *(unpad_parts(x, rows) for x in row_grads)
            )
        dtype = queries_HTd.dtype
        return grads.queries.to(dtype), grads.keys.to(dtype), grads.values.to(dtype), None, None


class QKVSlices:
    """Queries, keys and values, or their gradients, accessed by slices of the tokens."""

    def __init__(self, queries_HTd: Tensor, keys_KTd: Tensor, values_KTd: Tensor) -> None:
        self.queries, self.keys, self.values = queries_HTd, keys_KTd, values_KTd
        self.repeats = queries_HTd.shape[0] // keys_KTd.shape[0]

    def select_slices(self, queries: slice, keys: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Returns slices [1, H, ·, d]; keys and values are repeated for the heads of queries."""
        keys_HTd, values_HTd = (
            x[:, keys].repeat_interleave(self.repeats, dim=0) for x in (self.keys, self.values)
        )
        return self.queries[None, :, queries], keys_HTd[None], values_HTd[None]

    def pad_parts(self, parts: Sequence[slice]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns slices [parts, H, longest, d], padded with zeros; keys and values repeated."""
        keys_NHCd, values_NHCd = (
            pad_parts(x, parts).repeat_interleave(self.repeats, dim=1)
            for x in (self.keys, self.values)
        )
        return pad_parts(self.queries, parts), keys_NHCd, values_NHCd

    def attend_slices(
        self, queries: slice, keys: slice, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Returns the queries' attention [H, ·, d] to the keys, and the log-sum-exp [H, ·]."""
        out, normalizer = flash_attention(
            *self.select_slices(queries, keys), is_causal=causal, scale=scale
        )
        return out[0], normalizer[0]

    def accumulate_gradients(
        self, queries: slice, keys: slice, to_queries: Tensor, to_keys: Tensor, to_values: Tensor
    ) -> None:
        """Adds gradients [H, ·, d] to these slices; sums keys' and values' over repeated heads."""
        self.queries[:, queries] += to_queries
        for total, grad in ((self.keys, to_keys), (self.values, to_values)):
            total[:, keys] += grad.unflatten(0, (-1, self.repeats)).sum(dim=1, dtype=total.dtype)
