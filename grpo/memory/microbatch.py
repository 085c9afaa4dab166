"""A rollout in pieces that are computed at once, and a model's scores of all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.memory.budget import TokenLimit, split_evenly
from grpo.models.forward import Completions
from grpo.models.head import Features, Readout, TokenScores
from grpo.models.load import LanguageModel
from grpo.models.padding import pad_left
from grpo.models.reference import Reference
from grpo.models.sampling_filters import KeptTokens
from grpo.types import Rollout


@dataclass(frozen=True)
class MicroBatch:
    """The same number of rows of each of some prompts: what one forward and backward holds."""

    prompts: list[int]  # indices into B
    rows: Tensor  # indices into N, in order
    tokens: int  # of the prompts and of the rows


def split_into_micro_batches(
    rollout: Rollout, limit: TokenLimit, prompts: Sequence[int] | None = None
) -> Iterator[MicroBatch]:
    """Whole groups in length order, evenly spread; one that is over the limit is cut into rows.

    Args:
        prompts: indices into B; None for all.
    """
    group = rollout.num_generation
    lengths_BG = rollout.lengths_N.view(-1, group).tolist()
    prompt_B = [len(prompt.token_ids) for prompt in rollout.prompts]

    def cut(b: int, rows: Sequence[int]) -> MicroBatch:
        own = torch.tensor(rows) + b * group
        return MicroBatch([b], own, prompt_B[b] + sum(lengths_BG[b][g] for g in rows))

    whole = []
    chosen = range(len(prompt_B)) if prompts is None else prompts
    for b in sorted(chosen, key=lambda b: (max(lengths_BG[b]), prompt_B[b])):
        one = cut(b, range(group))
        if one.tokens <= limit.max_at_once:
            whole.append(one)
            continue
        fitting = max(1, (limit.max_at_once - prompt_B[b]) // max(lengths_BG[b]))
        pieces = -(-group // fitting)
        for rows in torch.arange(group).tensor_split(pieces):
            yield cut(b, rows.tolist())
    for share in split_evenly([one.tokens for one in whole], limit.tokens):
        some = whole[share]
        yield MicroBatch(
            [b for one in some for b in one.prompts],
            torch.cat([one.rows for one in some]),
            sum(one.tokens for one in some),
        )


def select_completions(
    rollout: Rollout,
    batch: MicroBatch,
    policy: LanguageModel,
    kept_tokens: KeptTokens | None = None,
) -> Completions:
    """A micro-batch's tensors, cut to its own longest prompt and completion.

    kept: of the rollout, where what sampling leaves of the vocabulary has to stay what it was.
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
    """Whole completions of so many tokens together, one at least: their rows, their tokens."""
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
    """What a divergence is measured from, where the readout asks for one."""
    if reference is None or readout.divergence is None:
        return None
    return reference.compute_features(inputs)


@torch.no_grad()
def score_rollout(
    model: LanguageModel,
    rollout: Rollout,
    readout: Readout,
    limit: TokenLimit,
    reference: Reference | None = None,
    kept_tokens: KeptTokens | None = None,
) -> TokenScores:
    """A model's scores [N, C] of a whole rollout, without gradient.

    Args:
        reference: what a divergence is measured from, where the readout asks for one.
        kept: as in `select_completions`.
    """
    scores = TokenScores(*(torch.zeros_like(rollout.logprobs_NC) for _ in TokenScores._fields))

    def work() -> None:
        for batch in split_into_micro_batches(rollout, limit):
            limit.record_start(batch.tokens)
            inputs = select_completions(rollout, batch, model, kept_tokens)
            against = compute_reference_features(reference, readout, inputs)
            rows, width = batch.rows.to(rollout.tokens_NC.device), inputs.tokens_NC.shape[1]
            part = model.score_batch(inputs, readout, against)
            for whole_NC, part_NC in zip(scores, part, strict=True):
                whole_NC[rows, :width] = part_NC

    limit.retry_smaller(work)
    return scores
