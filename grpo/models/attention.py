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

from grpo.models.cpu.linear import batched_in_fp32, compute_dtype
from grpo.models.cpu.tree_attention import flash, has_fused_kernel, split
from grpo.models.padding import taken
from grpo.models.plan import NAME, Plan, Scoring, attention_as
from grpo.models.tree import Tree, padded, unpadded


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    plan: Plan,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **ignored: Any,  # transformers' interface; what matters of it is seen by `why_not_shared`
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, H, T, d] in, [1, T, H, d] out."""
    dtype = compute_dtype(query)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    how = Scoring(scaling or query.shape[-1] ** -0.5, sliding_window, softcap)
    return plan.attend(module.layer_idx, query[0], key[0], value[0], how)[None], None  # type: ignore[arg-type]


AttentionInterface.register(NAME, attend)


def read(model: PreTrainedModel, tokens_T: Tensor, positions_T: Tensor, plan: Plan) -> Tensor:
    """[T, D] the last hidden states of tokens that see each other as the plan says."""
    # Under this name transformers makes no mask either.
    with attention_as(model.config.get_text_config(), NAME):
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
        self, layer: int, queries_HTd: Tensor, keys_KTd: Tensor, values_KTd: Tensor, how: Scoring
    ) -> Tensor:
        """As `Plan.attend` says."""
        reaches_back = how.window is None or how.window >= self.tree.longest
        if has_fused_kernel(queries_HTd) and reaches_back and how.softcap is None:
            return split(queries_HTd, keys_KTd, values_KTd, self.tree, how.scale)
        return expanded(queries_HTd, keys_KTd, values_KTd, self.tree, how)


def expanded(
    queries_HTd: Tensor, keys_KTd: Tensor, values_KTd: Tensor, tree: Tree, how: Scoring
) -> Tensor:
    """The plain way: each completion beside a copy of its prompt, what it doesn't see masked."""
    queries, keys, values = (padded(x, tree.prompts) for x in (queries_HTd, keys_KTd, values_KTd))
    positions_P = torch.arange(queries.shape[2], device=queries.device)
    # Padding stands behind a prompt, where none of its own tokens looks.
    past_PP = sees(positions_P[:, None], positions_P, how.window)
    out = unpadded(dense(queries, keys, values, past_PP[None], how), tree.prompts)
    own = [part for part in tree.completions if part.stop > part.start]
    if not own:
        return out.transpose(0, 1)
    rows = [n for n, part in enumerate(tree.completions) if part.stop > part.start]
    prompt_N = torch.tensor([n // tree.rows for n in rows], device=queries.device)
    lengths_N11 = torch.tensor(tree.prompt_lengths, device=queries.device)[prompt_N, None, None]
    more_queries, more_keys, more_values = (
        padded(x, own) for x in (queries_HTd, keys_KTd, values_KTd)
    )
    columns_C = torch.arange(more_queries.shape[2], device=queries.device)
    from_N = lengths_N11 + columns_C[:, None]
    to_prompt = sees(from_N, positions_P, how.window) & (positions_P < lengths_N11)
    to_own = sees(from_N, lengths_N11 + columns_C, how.window)
    out_own = dense(
        more_queries,
        torch.cat([taken(keys, prompt_N), more_keys], dim=2),
        torch.cat([taken(values, prompt_N), more_values], dim=2),
        torch.cat([to_prompt, to_own], dim=2),
        how,
    )
    return torch.cat([out, unpadded(out_own, own)], dim=1).transpose(0, 1)


def sees(from_position: Tensor, to_position: Tensor, window: int | None) -> Tensor:
    """Bool: a token at one position sees one at the other, of the same way from the root."""
    seen = to_position <= from_position
    return seen if window is None else seen & (from_position - to_position < window)


def dense(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, how: Scoring) -> Tensor:
    """[N, H, ·, d] from queries [N, H, ·, d], keys and values [N, K, ·, d] and a mask [N, ·, ·]."""
    repeats = queries.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(repeats, dim=1) for x in (keys, values))
    if how.softcap is None:
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask[:, None], scale=how.scale
        )
    scores = how.apply(batched_in_fp32(queries, keys.transpose(-1, -2)) * how.scale)
    scores = scores.masked_fill(~mask[:, None], -torch.inf)
    return scores.softmax(dim=-1).to(values.dtype) @ values


class Seen:
    """Which keys each query sees, [N, 1, 1, ·] or [N, K, ·, ·] bool; made once for many layers."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.added = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
        blind = ~mask.any(dim=-1)
        self.blind = blind if bool(blind.any()) else None  # the queries that see nothing


def weighted(
    queries: Tensor, keys: Tensor, values: Tensor, how: Scoring, seen: Seen | None = None
) -> tuple[Tensor, Tensor]:
    """[N, K, ·, d] what queries take from keys, and [N, K, ·] the log-sum-exp of their scores.

    All [N, K, ·, d]; queries of heads that share keys stand side by side. What is taken from other
    keys can then be put beside it, each in the share of its log-sum-exp. A query that sees nothing
    takes zeros, at a log-sum-exp of -inf.
    """
    if has_fused_kernel(queries) and how.softcap is None:
        added = None
        if seen is not None:
            shape = (queries.shape[0], 1, queries.shape[2], keys.shape[2])
            added = seen.added.to(queries.dtype).expand(shape)
        out, normalizer = flash(queries, keys, values, attn_mask=added, scale=how.scale)
    else:
        scores = how.apply(batched_in_fp32(queries, keys.transpose(-1, -2)) * how.scale)
        if seen is not None:
            scores = scores + seen.added
        normalizer = scores.logsumexp(dim=-1)
        out = batched_in_fp32((scores - normalizer[..., None]).exp(), values)
    if seen is not None and seen.blind is not None:
        out = out.masked_fill(seen.blind[..., None], 0.0)
        normalizer = normalizer.masked_fill(seen.blind, -torch.inf)
    return out, normalizer
