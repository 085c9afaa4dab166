"""Splits a rollout into micro-batches, and scores a whole rollout with a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from grpo.memory.budget import TokenLimit, split_evenly
from grpo.models.forward import Completions
from grpo.models.fsdp import release_gathered
from grpo.models.head import Features, Readout, TokenScores
from grpo.models.load import LanguageModel
from grpo.models.padding import pad_left
from grpo.models.reference import Reference
from grpo.models.sampling_filters import KeptTokens
from grpo.parallel import ONE_RANK, Ranks
from grpo.types import Rollout

T = TypeVar("T")


@dataclass(frozen=True)
class MicroBatch:
    """Prompts, and equally many rows of each, that one forward and backward pass computes."""

    prompts: list[int]  # indices into B
    rows: Tensor  # indices into N, in the order of the prompts
    tokens: int  # of the prompts and rows together


def split_into_micro_batches(
    rollout: Rollout, limit: TokenLimit, prompts: Sequence[int] | None = None
) -> Iterator[MicroBatch]:
    """Yields micro-batches of similar size: whole groups in the order of their lengths.

    A group that exceeds the limit is divided into parts of at least one row.

    Args:
        prompts: indices into B; None takes all.
    """
    group = rollout.num_generation
    lengths_BG = rollout.lengths_N.view(-1, group).tolist()
    prompt_B = [len(prompt.token_ids) for prompt in rollout.prompts]

    def select(b: int, rows: Sequence[int]) -> MicroBatch:
        indices = torch.tensor(rows) + b * group
        return MicroBatch([b], indices, prompt_B[b] + sum(lengths_BG[b][g] for g in rows))

    whole = []
    chosen = range(len(prompt_B)) if prompts is None else prompts
    for b in sorted(chosen, key=lambda b: (max(lengths_BG[b]), prompt_B[b])):
        one = select(b, range(group))
        if one.tokens <= limit.max_at_once:
            whole.append(one)
            continue
        max_rows = max(1, (limit.max_at_once - prompt_B[b]) // max(lengths_BG[b]))
        parts = -(-group // max_rows)
        for rows in torch.arange(group).tensor_split(parts):
            yield select(b, rows.tolist())
    for share in split_evenly([one.tokens for one in whole], limit.tokens):
        groups = whole[share]
        yield MicroBatch(
            [b for one in groups for b in one.prompts],
            torch.cat([one.rows for one in groups]),
            sum(one.tokens for one in groups),
        )


@dataclass(frozen=True)
class Pass:
    """A model's forward pass over a micro-batch, and perhaps a backward pass."""

    batch: MicroBatch
    with_gradient: bool
    counts: bool = True  # False: only so that this process makes as many passes as the others


def plan_passes(
    batches: Iterable[MicroBatch],
    with_gradient: Sequence[bool],
    model: LanguageModel,
    ranks: Ranks,
) -> list[Pass]:
    """Returns a pass for each micro-batch.

    If the model's weights are divided among processes, which compute them together, all processes
    make equally many passes, with a backward pass if any of them needs one.
    """
    own = [Pass(*pair) for pair in zip(batches, with_gradient, strict=True)]
    if not model.is_sharded:
        return own
    planned = ranks.gather(lambda: list(with_gradient))
    spare = MicroBatch([0], torch.tensor([0]), 1)  # a row of any rank's
    passes = []
    for n in range(max(map(len, planned))):
        gradient = any(flags[n] for flags in planned if n < len(flags))
        counts = n < len(own)
        passes.append(Pass(own[n].batch if counts else spare, gradient, counts))
    return passes


def divide_prompts(rollout: Rollout, prompts: Sequence[int], ranks: Ranks) -> list[int]:
    """Returns those of the prompts, indices into B, that this rank computes: balanced by tokens."""
    if ranks.size == 1:
        return list(prompts)
    tokens_B = rollout.lengths_N.view(-1, rollout.num_generation).sum(dim=1).tolist()
    costs = [tokens_B[b] + len(rollout.prompts[b].token_ids) for b in prompts]
    return [prompts[n] for n in ranks.divide(costs)[ranks.index]]


def select_completions(
    rollout: Rollout,
    batch: MicroBatch,
    policy: LanguageModel,
    kept_tokens: KeptTokens | None = None,
) -> Completions:
    """Returns a micro-batch's tensors, cut to its longest prompt and completion.

    Args:
        kept_tokens: the tokens that sampling may draw, if they are fixed for the whole rollout.
    """
    rows = batch.rows.to(rollout.tokens_NC.device)
    width = int(rollout.lengths_N[rows].max())
    prompts_BP, lengths_B = pad_left(
        [rollout.prompts[b].token_ids for b in batch.prompts], policy.pad_id, rows.device
    )
    return Completions(
        prompts_BP=prompts_BP,
        prompt_lengths_B=lengths_B,
        tokens_NC=rollout.tokens_NC[rows, :width],
        mask_NC=rollout.mask_NC[rows, :width],
        rows_N=rows,
        kept_tokens=kept_tokens,
    )


def split_head_chunks(inputs: Completions, most: int) -> Iterator[tuple[slice, slice]]:
    """Yields rows and tokens of whole completions with at most `most` tokens, at least one each.

    The first slice is of N, the second of the T completion tokens.
    """
    start = begin = end = 0
    for row, length in enumerate(inputs.mask_NC.sum(dim=1).tolist()):
        if end + length - begin > most and row > start:
            yield slice(start, row), slice(begin, end)
            start, begin = row, end
        end += length
    yield slice(start, len(inputs.mask_NC)), slice(begin, end)


def compute_reference_features(
    reference: Reference | None, readout: Readout, inputs: Completions
) -> Features | None:
    """Returns the reference's features if the readout measures a divergence, else None."""
    if reference is None or readout.divergence is None:
        return None
    return reference.compute_features(inputs)


def release_features(model: LanguageModel, reference: Reference | None) -> None:
    """Frees what the models had gathered for their last pass, if their weights are divided."""
    release_gathered(model.model)
    if reference is not None:
        release_gathered(reference.model.model)


def compute_within_limit(
    model: LanguageModel,
    limit: TokenLimit,
    work: Callable[[], T],
    ranks: Ranks,
    undo: Callable[[], None] = lambda: None,
) -> T:
    """Returns work(), which computes at most `limit` at once; see `TokenLimit.retry_smaller`.

    With a sharded model all ranks compute together, so none can try again alone.

    Raises:
        RunError: memory ran out, and less can't be computed at once.
    """
    if not model.is_sharded:
        return limit.retry_smaller(work, undo)
    return ranks.compute_together(lambda: limit.call_once(work))


@torch.no_grad()
def score_rollout(
    model: LanguageModel,
    rollout: Rollout,
    readout: Readout,
    limit: TokenLimit,
    reference: Reference | None = None,
    kept_tokens: KeptTokens | None = None,
    ranks: Ranks = ONE_RANK,
) -> TokenScores:
    """Returns a model's scores [N, C] of a whole rollout, without gradient.

    Args:
        reference: the model from which the readout's divergence is measured.
        kept_tokens: the tokens that sampling may draw, if they are fixed for the whole rollout;
            those of places that have none yet are stored.
        ranks: each scores a share of the prompts.

    Raises:
        RunError: memory ran out with as few tokens as can be computed at once.
    """
    scores = TokenScores(*(torch.zeros_like(rollout.logprobs_NC) for _ in TokenScores._fields))
    prompts = divide_prompts(rollout, range(len(rollout.prompts)), ranks)

    def score_share() -> tuple[TokenScores, KeptTokens | None]:
        compute_within_limit(model, limit, work, ranks)
        return scores, kept_tokens

    def work() -> None:
        batches = list(split_into_micro_batches(rollout, limit, prompts))
        for one in plan_passes(batches, [False] * len(batches), model, ranks):
            batch = one.batch
            limit.record_start(batch.tokens)
            kept = kept_tokens if one.counts else None  # no rank may store another's rows
            inputs = select_completions(rollout, batch, model, kept)
            reference_features = compute_reference_features(reference, readout, inputs)
            rows, width = batch.rows.to(rollout.tokens_NC.device), inputs.tokens_NC.shape[1]
            part = model.score_batch(inputs, readout, reference_features)
            release_features(model, reference)
            if not one.counts:
                continue
            for whole_NC, part_NC in zip(scores, part, strict=True):
                whole_NC[rows, :width] = part_NC

    parts = ranks.gather(score_share)
    if len(parts) == 1:
        return scores
    if kept_tokens is not None:
        kept_tokens.join([kept for _, kept in parts if kept is not None])
    # A rank has zeros in the rows of the others.
    return TokenScores(
        *(
            torch.stack(of_ranks).sum(dim=0)
            for of_ranks in zip(*(scores for scores, _ in parts), strict=True)
        )
    )
