"""Attention over trees: each prompt once, its completions hanging from it, and nothing padded.

A model of transformers is run on one row of T tokens, all prompts and then all completions, and
asks here what each token sees: a prompt's its own past, a completion's its whole prompt and its own
past. So a prompt is computed once for its group, whatever the layer does with a token goes over all
of them in one product, and no key or value is copied G times.

Shape letters beside the usual ones: H heads, K heads of keys and values (H = K·r), d their width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from grpo.models.cpu.linear import batched_in_fp32, compute_dtype, sum_dtype
from grpo.models.padding import taken

NAME = "grpo_tree"  # under which transformers finds `attend`


@dataclass(frozen=True)
class Scoring:
    """How a layer scores a key."""

    scale: float
    window: int | None = None  # it sees this many tokens, itself among them
    softcap: float | None = None  # scores go through cap · tanh(score / cap)

    def apply(self, scores: Tensor) -> Tensor:
        """From query · key · scale."""
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap


class Plan(Protocol):
    """What the tokens of a forward pass see of each other, and of what came before."""

    def attend(
        self, layer: int, queries_HTd: Tensor, keys_KTd: Tensor, values_KTd: Tensor, how: Scoring
    ) -> Tensor:
        """[T, H, d] what each token takes from those it sees."""


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


@contextmanager
def attention_as(config: PreTrainedConfig, name: str) -> Iterator[None]:
    """Within it, the layers with this config compute attention the way of that name."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


@dataclass(frozen=True)
class Tree:
    """B prompts, each with the same number of completions: T tokens, all prompts first."""

    prompt_lengths: tuple[int, ...]
    lengths: tuple[int, ...]  # of the N completions; 0 is a completion of which nothing is read

    @property
    def rows(self) -> int:
        """Completions a prompt."""
        return len(self.lengths) // len(self.prompt_lengths)

    @property
    def prompt_tokens(self) -> int:
        return sum(self.prompt_lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest way from a root to a leaf."""
        return max(self.prompt_lengths) + max(self.lengths, default=0)

    @cached_property
    def prompts(self) -> list[slice]:
        """Where in T each prompt is."""
        return spans(self.prompt_lengths, 0)

    @cached_property
    def branches(self) -> list[slice]:
        """Where in T the completions of each prompt are."""
        own = [
            sum(self.lengths[b * self.rows : (b + 1) * self.rows])
            for b in range(len(self.prompt_lengths))
        ]
        return spans(own, self.prompt_tokens)

    @cached_property
    def completions(self) -> list[slice]:
        """Where in T each completion is."""
        return spans(self.lengths, self.prompt_tokens)

    def positions(self, device: torch.device) -> Tensor:
        """[T] how many tokens stand before each on its way from the root."""
        ways = [torch.arange(length) for length in self.prompt_lengths]
        for n, length in enumerate(self.lengths):
            ways.append(torch.arange(length) + self.prompt_lengths[n // self.rows])
        return torch.cat(ways).to(device)

    def attend(
        self, layer: int, queries_HTd: Tensor, keys_KTd: Tensor, values_KTd: Tensor, how: Scoring
    ) -> Tensor:
        """As `Plan.attend` says."""
        reaches_back = how.window is None or how.window >= self.longest
        if has_fused_kernel(queries_HTd) and reaches_back and how.softcap is None:
            return split(queries_HTd, keys_KTd, values_KTd, self, how.scale)
        return expanded(queries_HTd, keys_KTd, values_KTd, self, how)


def spans(lengths: Sequence[int], start: int) -> list[slice]:
    """One after the other."""
    found = []
    for length in lengths:
        found.append(slice(start, start + length))
        start += length
    return found


def padded(x_XTd: Tensor, parts: Sequence[slice]) -> Tensor:
    """Parts of T as [parts, X, longest, d], zeros behind the shorter ones."""
    first, width = parts[0], parts[0].stop - parts[0].start
    if all(part.stop - part.start == width for part in parts):
        whole = x_XTd[:, first.start : parts[-1].stop]
        return whole.view(whole.shape[0], len(parts), width, whole.shape[2]).transpose(0, 1)
    rows = [x_XTd[:, part].transpose(0, 1) for part in parts]
    return pad_sequence(rows, batch_first=True).transpose(1, 2)


def unpadded(x_NXCd: Tensor, parts: Sequence[slice]) -> Tensor:
    """[X, T', d] the parts end to end again."""
    rows = [x_NXCd[n, :, : part.stop - part.start] for n, part in enumerate(parts)]
    return torch.cat(rows, dim=1)


# The fast way on a CPU: the fused kernel on each piece, the pieces put together by their
# log-sum-exp. With that of the whole given to a piece's backward, its gradient is that of the whole
# (as in ring attention, 2310.01889): the kernel makes the probabilities again as e^(score - it).
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def has_fused_kernel(x: Tensor) -> bool:
    """Whether torch has a kernel here that gives the scores' log-sum-exp: on a CPU alone."""
    return x.device.type == "cpu"


def split(
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
        pieces = Pieces(queries_HTd, keys_KTd, values_KTd)
        for prompt, branch in zip(tree.prompts, tree.branches, strict=True):
            out_HTd[:, prompt], normalizer_HT[:, prompt] = pieces.forward(
                prompt, prompt, True, scale
            )
            if branch.stop > branch.start:
                out_HTd[:, branch], normalizer_HT[:, branch] = pieces.forward(
                    branch, prompt, False, scale
                )
        own = [part for part in tree.completions if part.stop > part.start]
        if own:
            everywhere = slice(own[0].start, own[-1].stop)
            out, normalizer = _flash(*pieces.padded(own), is_causal=True, scale=scale)
            out_own, own_HT = unpadded(out, own), unpadded(normalizer[..., None], own)[..., 0]
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
        pieces = Pieces(queries_HTd, keys_KTd, values_KTd)
        grad_HTd, out_HTd = grad_THd.transpose(0, 1), out_THd.transpose(0, 1)
        asked = (queries_HTd, keys_KTd, values_KTd)
        grads = Pieces(*(torch.zeros_like(x, dtype=sum_dtype(x)) for x in asked))
        for prompt, branch in zip(tree.prompts, tree.branches, strict=True):
            for part, causal in ((prompt, True), (branch, False)):
                if part.stop > part.start:
                    found = _flash_backward(
                        grad_HTd[None, :, part], *pieces.of(part, prompt),
                        out_HTd[None, :, part], normalizer_HT[None, :, part],
                        0.0, causal, scale=scale,
                    )  # fmt: skip
                    grads.add(part, prompt, *(x[0] for x in found))
        own = [part for part in tree.completions if part.stop > part.start]
        if own:
            everywhere = slice(own[0].start, own[-1].stop)
            found = _flash_backward(
                padded(grad_HTd, own), *pieces.padded(own), padded(out_HTd, own),
                padded(normalizer_HT[..., None], own)[..., 0], 0.0, True, scale=scale,
            )  # fmt: skip
            grads.add(everywhere, everywhere, *(unpadded(x, own) for x in found))
        dtype = queries_HTd.dtype
        return grads.queries.to(dtype), grads.keys.to(dtype), grads.values.to(dtype), None, None


class Pieces:
    """Queries, keys and values of which pieces are taken, or to which they are added."""

    def __init__(self, queries_HTd: Tensor, keys_KTd: Tensor, values_KTd: Tensor) -> None:
        self.queries, self.keys, self.values = queries_HTd, keys_KTd, values_KTd
        self.repeats = queries_HTd.shape[0] // keys_KTd.shape[0]

    def of(self, queries: slice, keys: slice) -> tuple[Tensor, Tensor, Tensor]:
        """[1, H, ·, d] each, keys and values repeated to as many heads as there are queries'."""
        keys_HTd, values_HTd = (
            x[:, keys].repeat_interleave(self.repeats, dim=0) for x in (self.keys, self.values)
        )
        return self.queries[None, :, queries], keys_HTd[None], values_HTd[None]

    def padded(self, parts: Sequence[slice]) -> tuple[Tensor, Tensor, Tensor]:
        """[parts, H, longest, d] each."""
        keys_NHCd, values_NHCd = (
            padded(x, parts).repeat_interleave(self.repeats, dim=1)
            for x in (self.keys, self.values)
        )
        return padded(self.queries, parts), keys_NHCd, values_NHCd

    def forward(
        self, queries: slice, keys: slice, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """[H, ·, d] what the queries take from the keys, and [H, ·] the scores' log-sum-exp."""
        out, normalizer = _flash(*self.of(queries, keys), is_causal=causal, scale=scale)
        return out[0], normalizer[0]

    def add(
        self, queries: slice, keys: slice, to_queries: Tensor, to_keys: Tensor, to_values: Tensor
    ) -> None:
        """Adds [H, ·, d] each; what was repeated over heads is summed over them."""
        self.queries[:, queries] += to_queries
        for own, more in ((self.keys, to_keys), (self.values, to_values)):
            own[:, keys] += more.unflatten(0, (-1, self.repeats)).sum(dim=1, dtype=own.dtype)


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
        out, normalizer = _flash(queries, keys, values, attn_mask=added, scale=how.scale)
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
