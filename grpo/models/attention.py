"""Attention over trees: each prompt once, its completions hanging from it, and nothing padded.

A model of transformers is run on one row of T tokens, all prompts and then all completions, and
asks here what each token sees: a prompt's its own past, a completion's its whole prompt and its own
past. So a prompt is computed once for its group, whatever the layer does with a token goes over all
of them in one product, and no key or value is copied G times.

Shape letters beside the usual ones: H heads, K heads of keys and values (H = K·r), d their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from grpo.models.attention_plan import ATTENTION_NAME, AttentionPlan, AttentionScoring, attention_as
from grpo.models.cpu.linear import compute_dtype, matmul_in_fp32
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
    **ignored: Any,  # transformers' interface; what matters of it is seen by `why_not_shared`
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, H, T, d] in, [1, T, H, d] out."""
    dtype = compute_dtype(query)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    how = AttentionScoring(scaling or query.shape[-1] ** -0.5, sliding_window, softcap)
    return plan.attend(module.layer_idx, query[0], key[0], value[0], how)[None], None  # type: ignore[arg-type]


AttentionInterface.register(ATTENTION_NAME, attend)


def compute_hidden_states(
    model: PreTrainedModel, tokens_T: Tensor, positions_T: Tensor, plan: AttentionPlan
) -> Tensor:
    """[T, D] the last hidden states of tokens that see each other as the plan says."""
    # Under this name transformers makes no mask either.
    with attention_as(model.config.get_text_config(), ATTENTION_NAME):
        output = model.base_model(
            input_ids=tokens_T[None], position_ids=positions_T[None], use_cache=False, plan=plan
        )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


@dataclass(frozen=True)
class TreePlan:
    """A token of a tree sees its whole way from the root: its prompt's and its own past."""

    tree: Tree

    def attend(
        self,
        layer: int,
        queries_HTd: Tensor,
        keys_KTd: Tensor,
        values_KTd: Tensor,
        scoring: AttentionScoring,
    ) -> Tensor:
        """As `Plan.attend` says."""
        reaches_back = scoring.window is None or scoring.window >= self.tree.longest
        if has_fused_kernel(queries_HTd) and reaches_back and scoring.softcap is None:
            return attend_split(queries_HTd, keys_KTd, values_KTd, self.tree, scoring.scale)
        return attend_expanded(queries_HTd, keys_KTd, values_KTd, self.tree, scoring)


def attend_expanded(
    queries_HTd: Tensor, keys_KTd: Tensor, values_KTd: Tensor, tree: Tree, scoring: AttentionScoring
) -> Tensor:
    """The plain way: each completion beside a copy of its prompt, what it doesn't see masked."""
    queries, keys, values = (
        pad_parts(x, tree.prompt_slices) for x in (queries_HTd, keys_KTd, values_KTd)
    )
    positions_P = torch.arange(queries.shape[2], device=queries.device)
    # Padding stands behind a prompt, where none of its own tokens looks.
    past_PP = causal_mask(positions_P[:, None], positions_P, scoring.window)
    out = unpad_parts(
        attend_dense(queries, keys, values, past_PP[None], scoring), tree.prompt_slices
    )
    own = [part for part in tree.completion_slices if part.stop > part.start]
    if not own:
        return out.transpose(0, 1)
    rows = [n for n, part in enumerate(tree.completion_slices) if part.stop > part.start]
    prompt_N = torch.tensor([n // tree.rows_per_prompt for n in rows], device=queries.device)
    lengths_N11 = torch.tensor(tree.prompt_lengths, device=queries.device)[prompt_N, None, None]
    more_queries, more_keys, more_values = (
        pad_parts(x, own) for x in (queries_HTd, keys_KTd, values_KTd)
    )
    columns_C = torch.arange(more_queries.shape[2], device=queries.device)
    from_N = lengths_N11 + columns_C[:, None]
    to_prompt = causal_mask(from_N, positions_P, scoring.window) & (positions_P < lengths_N11)
    to_own = causal_mask(from_N, lengths_N11 + columns_C, scoring.window)
    out_own = attend_dense(
        more_queries,
        torch.cat([gather_rows(keys, prompt_N), more_keys], dim=2),
        torch.cat([gather_rows(values, prompt_N), more_values], dim=2),
        torch.cat([to_prompt, to_own], dim=2),
        scoring,
    )
    return torch.cat([out, unpad_parts(out_own, own)], dim=1).transpose(0, 1)


def causal_mask(from_position: Tensor, to_position: Tensor, window: int | None) -> Tensor:
    """Bool: a token at one position sees one at the other, of the same way from the root."""
    seen = to_position <= from_position
    return seen if window is None else seen & (from_position - to_position < window)


def attend_dense(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scoring: AttentionScoring
) -> Tensor:
    """[N, H, ·, d] from queries [N, H, ·, d], keys and values [N, K, ·, d] and a mask [N, ·, ·]."""
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
    """Which keys each query sees, [N, 1, 1, ·] or [N, K, ·, ·] bool; made once for many layers."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.additive_mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(
            ~mask, -torch.inf
        )
        blind = ~mask.any(dim=-1)
        self.fully_masked = blind if bool(blind.any()) else None  # the queries that see nothing


def attend_with_logsumexp(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scoring: AttentionScoring,
    key_mask: KeyMask | None = None,
) -> tuple[Tensor, Tensor]:
    """[N, K, ·, d] what queries take from keys, and [N, K, ·] the log-sum-exp of their scores.

    All [N, K, ·, d]; queries of heads that share keys stand side by side. What is taken from other
    keys can then be put beside it, each in the share of its log-sum-exp. A query that sees nothing
    takes zeros, at a log-sum-exp of -inf.
    """
    if has_fused_kernel(queries) and scoring.softcap is None:
        added = None
        if key_mask is not None:
            shape = (queries.shape[0], 1, queries.shape[2], keys.shape[2])
            added = key_mask.additive_mask.to(queries.dtype).expand(shape)
        out, normalizer = flash_attention(
            queries, keys, values, attn_mask=added, scale=scoring.scale
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
