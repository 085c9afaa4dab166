"""Attention of a tree on a CPU: prompts and completions apart, by torch's fused kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpo.models.cpu.linear import sum_dtype
from grpo.models.tree import Tree, pad_parts, unpad_parts

# The fast way on a CPU: the fused kernel on each piece, the pieces put together by their
# log-sum-exp. With that of the whole given to a piece's backward, its gradient is that of the whole
# (as in ring attention, 2310.01889): the kernel makes the probabilities again as e^(score - it).
flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def has_fused_kernel(x: Tensor) -> bool:
    """Whether torch has a kernel here that gives the scores' log-sum-exp: on a CPU alone."""
    return x.device.type == "cpu"


def attend_split(
    queries_HTd: Tensor, keys_KTd: Tensor, values_KTd: Tensor, tree: Tree, scale: float
) -> Tensor:
    """[T, H, d] a tree's attention, where no layer's window or cap gets in the way."""
    out: Tensor = SplitAttention.apply(  # type: ignore[no-untyped-call]
        queries_HTd, keys_KTd, values_KTd, tree, scale
    )
    return out


class SplitAttention(torch.autograd.Function):
    """A tree's attention: prompts, completions to their prompt, completions to themselves.

    Keeps queries, keys, values, the output and a log-sum-exp for each head and token. Whatever the
    precision of the products, pieces are put together and gradients added up in fp32 or better.
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
        pieces = QKVSlices(queries_HTd, keys_KTd, values_KTd)
        for prompt, branch in zip(tree.prompt_slices, tree.group_slices, strict=True):
            out_HTd[:, prompt], normalizer_HT[:, prompt] = pieces.attend_slices(
                prompt, prompt, True, scale
            )
            if branch.stop > branch.start:
                out_HTd[:, branch], normalizer_HT[:, branch] = pieces.attend_slices(
                    branch, prompt, False, scale
                )
        own = [part for part in tree.completion_slices if part.stop > part.start]
        if own:
            everywhere = slice(own[0].start, own[-1].stop)
            out, normalizer = flash_attention(*pieces.pad_parts(own), is_causal=True, scale=scale)
            out_own, own_HT = unpad_parts(out, own), unpad_parts(normalizer[..., None], own)[..., 0]
            of_prompt_HT = normalizer_HT[:, everywhere]
            whole_HT = torch.logaddexp(of_prompt_HT, own_HT)
            out_HTd[:, everywhere] *= (of_prompt_HT - whole_HT).exp_()[..., None]
            out_HTd[:, everywhere] += out_own.to(sums).mul_((own_HT - whole_HT).exp_()[..., None])
            normalizer_HT[:, everywhere] = whole_HT
        out_THd = whole_THd.to(queries_HTd.dtype)
        ctx.save_for_backward(queries_HTd, keys_KTd, values_KTd, out_THd, normalizer_HT)
        ctx.tree, ctx.scale = tree, scale
        return out_THd

    @staticmethod
    def backward(ctx: Any, grad_THd: Tensor) -> tuple[Tensor | None, ...]:
        queries_HTd, keys_KTd, values_KTd, out_THd, normalizer_HT = ctx.saved_tensors
        tree, scale = ctx.tree, ctx.scale
        pieces = QKVSlices(queries_HTd, keys_KTd, values_KTd)
        grad_HTd, out_HTd = grad_THd.transpose(0, 1), out_THd.transpose(0, 1)
        asked = (queries_HTd, keys_KTd, values_KTd)
        grads = QKVSlices(*(torch.zeros_like(x, dtype=sum_dtype(x)) for x in asked))
        for prompt, branch in zip(tree.prompt_slices, tree.group_slices, strict=True):
            for part, causal in ((prompt, True), (branch, False)):
                if part.stop > part.start:
                    found = flash_attention_backward(
                        grad_HTd[None, :, part], *pieces.select_slices(part, prompt),
                        out_HTd[None, :, part], normalizer_HT[None, :, part],
                        0.0, causal, scale=scale,
                    )  # fmt: skip
                    grads.accumulate_gradients(part, prompt, *(x[0] for x in found))
        own = [part for part in tree.completion_slices if part.stop > part.start]
        if own:
            everywhere = slice(own[0].start, own[-1].stop)
            found = flash_attention_backward(
                pad_parts(grad_HTd, own), *pieces.pad_parts(own), pad_parts(out_HTd, own),
                pad_parts(normalizer_HT[..., None], own)[..., 0], 0.0, True, scale=scale,
            )  # fmt: skip
            grads.accumulate_gradients(
                everywhere, everywhere, *(unpad_parts(x, own) for x in found)
            )
        dtype = queries_HTd.dtype
        return grads.queries.to(dtype), grads.keys.to(dtype), grads.values.to(dtype), None, None


class QKVSlices:
    """Queries, keys and values of which pieces are taken, or to which they are added."""

    def __init__(self, queries_HTd: Tensor, keys_KTd: Tensor, values_KTd: Tensor) -> None:
        self.queries, self.keys, self.values = queries_HTd, keys_KTd, values_KTd
        self.repeats = queries_HTd.shape[0] // keys_KTd.shape[0]

    def select_slices(self, queries: slice, keys: slice) -> tuple[Tensor, Tensor, Tensor]:
        """[1, H, ·, d] each, keys and values repeated to as many heads as there are queries'."""
        keys_HTd, values_HTd = (
            x[:, keys].repeat_interleave(self.repeats, dim=0) for x in (self.keys, self.values)
        )
        return self.queries[None, :, queries], keys_HTd[None], values_HTd[None]

    def pad_parts(self, parts: Sequence[slice]) -> tuple[Tensor, Tensor, Tensor]:
        """[parts, H, longest, d] each."""
        keys_NHCd, values_NHCd = (
            pad_parts(x, parts).repeat_interleave(self.repeats, dim=1)
            for x in (self.keys, self.values)
        )
        return pad_parts(self.queries, parts), keys_NHCd, values_NHCd

    def attend_slices(
        self, queries: slice, keys: slice, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """[H, ·, d] what the queries take from the keys, and [H, ·] the scores' log-sum-exp."""
        out, normalizer = flash_attention(
            *self.select_slices(queries, keys), is_causal=causal, scale=scale
        )
        return out[0], normalizer[0]

    def accumulate_gradients(
        self, queries: slice, keys: slice, to_queries: Tensor, to_keys: Tensor, to_values: Tensor
    ) -> None:
        """Adds [H, ·, d] each; what was repeated over heads is summed over them."""
        self.queries[:, queries] += to_queries
        for own, more in ((self.keys, to_keys), (self.values, to_values)):
            own[:, keys] += more.unflatten(0, (-1, self.repeats)).sum(dim=1, dtype=own.dtype)
