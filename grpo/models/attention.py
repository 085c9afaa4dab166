"""Attention over trees: each prompt is computed once for all its completions, without padding.

A model of transformers reads one row of T tokens, all prompts and then all completions, and calls
this module for its attention: a prompt's token attends to the tokens before it, and a completion's
to its whole prompt and to the completion's tokens before it. So a prompt is computed once for its
group, and a layer's matrix products run over all tokens at once.

Shape letters beside the usual ones: H query heads, K key-value heads (H = K·r), d their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from grpo.models.attention_plan import ATTENTION_NAME, AttentionPlan, AttentionScoring, attention_as
from grpo.models.cpu.linear import compute_dtype, matmul_in_fp32, suits_onednn
from grpo.models.cpu.tree_attention import attend_split, flash_attention, has_fused_kernel
from grpo.models.padding import gather_rows
from grpo.models.tree import Tree, pad_parts, unpad_parts


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    plan: AttentionPlan,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **ignored: Any,  # transformers' other options; `find_sharing_problem` sees if they matter
) -> tuple[Tensor, None]:
    """Implements transformers' attention interface: [1, H, T, d] in, [1, T, H, d] out."""
    dtype = compute_dtype(query)
    if has_fused_kernel(query) and suits_onednn(query):
        dtype = torch.float32  # the fused kernel is no faster in bf16, and its backward is slower
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scoring = AttentionScoring(scaling or query.shape[-1] ** -0.5, sliding_window, softcap)
    return plan.attend(module.layer_idx, query[0], key[0], value[0], scoring)[None], None  # type: ignore[arg-type]


AttentionInterface.register(ATTENTION_NAME, attend)


def compute_hidden_states(
    model: PreTrainedModel, tokens_T: Tensor, positions_T: Tensor, plan: AttentionPlan
) -> Tensor:
    """Returns the last hidden states [T, D] of tokens that attend to each other as planned."""
    # Under this name transformers makes no mask.
    with attention_as(model.config.get_text_config(), ATTENTION_NAME):
        run = getattr(model, "run_base", model.base_model)  # set by `fsdp.shard_model`
        output = run(
            input_ids=tokens_T[None], position_ids=positions_T[None], use_cache=False, plan=plan
        )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


@dataclass(frozen=True)
class TreePlan:
    """Each token of a tree attends to its path from the root: its prompt, its completion so far."""

    tree: Tree

    def attend(
        self,
        layer: int,
        queries_HTd: Tensor,
        keys_KTd: Tensor,
        values_KTd: Tensor,
        scoring: AttentionScoring,
    ) -> Tensor:
        """Implements `AttentionPlan.attend`."""
        sees_all = scoring.window is None or scoring.window >= self.tree.longest
        if has_fused_kernel(queries_HTd) and sees_all and scoring.softcap is None:
            return attend_split(queries_HTd, keys_KTd, values_KTd, self.tree, scoring.scale)
        return attend_expanded(queries_HTd, keys_KTd, values_KTd, self.tree, scoring)


def attend_expanded(
    queries_HTd: Tensor, keys_KTd: Tensor, values_KTd: Tensor, tree: Tree, scoring: AttentionScoring
) -> Tensor:
    """Returns a tree's attention [T, H, d] from padded rows, each with a copy of its prompt.

    Supports windows and soft caps, on all devices.
    """
    queries, keys, values = (
        pad_parts(x, tree.prompt_slices) for x in (queries_HTd, keys_KTd, values_KTd)
    )
    positions_P = torch.arange(queries.shape[2], device=queries.device)
    # Padding comes after a prompt, so no token of the prompt attends to it.
    past_PP = causal_mask(positions_P[:, None], positions_P, scoring.window)
    out = unpad_parts(
        attend_dense(queries, keys, values, past_PP[None], scoring), tree.prompt_slices
    )
    completions = [part for part in tree.completion_slices if part.stop > part.start]
    if not completions:
        return out.transpose(0, 1)
    rows = [n for n, part in enumerate(tree.completion_slices) if part.stop > part.start]
    prompt_N = torch.tensor([n // tree.rows_per_prompt for n in rows], device=queries.device)
    lengths_N11 = torch.tensor(tree.prompt_lengths, device=queries.device)[prompt_N, None, None]
    row_queries, row_keys, row_values = (
        pad_parts(x, completions) for x in (queries_HTd, keys_KTd, values_KTd)
    )
    columns_C = torch.arange(row_queries.shape[2], device=queries.device)
    from_NC1 = lengths_N11 + columns_C[:, None]
    prompt_mask = causal_mask(from_NC1, positions_P, scoring.window) & (positions_P < lengths_N11)
    row_mask = causal_mask(from_NC1, lengths_N11 + columns_C, scoring.window)
    row_out = attend_dense(
        row_queries,
        torch.cat([gather_rows(keys, prompt_N), row_keys], dim=2),
        torch.cat([gather_rows(values, prompt_N), row_values], dim=2),
        torch.cat([prompt_mask, row_mask], dim=2),
        scoring,
    )
    return torch.cat([out, unpad_parts(row_out, completions)], dim=1).transpose(0, 1)


def causal_mask(from_position: Tensor, to_position: Tensor, window: int | None) -> Tensor:
    """Returns whether a token at one position attends to one at the other, on the same path."""
    seen = to_position <= from_position
    return seen if window is None else seen & (from_position - to_position < window)


def attend_dense(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scoring: AttentionScoring
) -> Tensor:
    """Returns [N, H, ·, d] from queries [N, H, ·, d], keys, values [N, K, ·, d], mask [N, ·, ·]."""
    repeats = queries.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(repeats, dim=1) for x in (keys, values))
    if scoring.softcap is None:
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask[:, None], scale=scoring.scale
        )
    scores = scoring.apply(matmul_in_fp32(queries, keys.transpose(-1, -2)) * scoring.scale)
    scores = scores.masked_fill(~mask[:, None], -torch.inf)
    return scores.softmax(dim=-1).to(values.dtype) @ values


class KeyMask:
    """A mask of the keys that queries attend to, made once for all layers that share it."""

    def __init__(self, mask: Tensor) -> None:
        """mask: bool, [N, 1, 1, ·] or [N, K, ·, ·]; true on the keys that a query attends to."""
        self.mask = mask
        self.additive_mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(
            ~mask, -torch.inf
        )
        fully_masked = ~mask.any(dim=-1)
        # The queries that attend to no key; None if there are none.
        self.fully_masked = fully_masked if bool(fully_masked.any()) else None


def attend_with_logsumexp(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scoring: AttentionScoring,
    key_mask: KeyMask | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the attention output [N, K, ·, d] and the log-sum-exp [N, K, ·] of its scores.

    Queries, keys and values are [N, K, ·, d], with the queries of heads that share keys side by
    side. With the log-sum-exp, the output can be combined with that over other keys. A query
    without keys gives zeros, and -inf as its log-sum-exp.
    """
    if has_fused_kernel(queries) and scoring.softcap is None:
        bias = None
        if key_mask is not None:
            shape = (queries.shape[0], 1, queries.shape[2], keys.shape[2])
            bias = key_mask.additive_mask.to(queries.dtype).expand(shape)
        out, normalizer = flash_attention(
            queries, keys, values, attn_mask=bias, scale=scoring.scale
        )
    else:
        scores = scoring.apply(matmul_in_fp32(queries, keys.transpose(-1, -2)) * scoring.scale)
        if key_mask is not None:
            scores = scores + key_mask.additive_mask
        normalizer = scores.logsumexp(dim=-1)
        out = matmul_in_fp32((scores - normalizer[..., None]).exp(), values)
    if key_mask is not None and key_mask.fully_masked is not None:
        out = out.masked_fill(key_mask.fully_masked[..., None], 0.0)
        normalizer = normalizer.masked_fill(key_mask.fully_masked, -torch.inf)
    return out, normalizer
