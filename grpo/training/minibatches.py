"""Splits a rollout's groups into minibatches, and weights their tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from grpo.memory.budget import TokenLimit
from grpo.memory.microbatch import (
    score_rollout,
)
from grpo.models.head import Readout
from grpo.models.load import LanguageModel
from grpo.objective import Tokens, top_entropy_mask
from grpo.objective.weights import Averaging
from grpo.parallel import ONE_RANK, Ranks
from grpo.seeds import SEED_LIMIT
from grpo.training.loss import (
    Minibatch,
    Objective,
)
from grpo.types import Rollout


def split_minibatches(
    policy: LanguageModel,
    objective: Objective,
    rollout: Rollout,
    limit: TokenLimit,
    seed: int,
    unscored_N: Tensor | None = None,
    ranks: Ranks = ONE_RANK,
) -> Iterator[Minibatch]:
    """Yields the minibatch of each optimizer step; each pass splits the groups at random.

    The policy loss is averaged over the completions that have a reward. A completion without one
    doesn't count as a zero: that would shrink every step by the share of failed rewards. verl, too,
    averages over the sequences that aren't masked. Groups with equal rewards do count, as in the
    papers.
    """
    mask_NC = rollout.mask_NC
    if objective.mask_truncated:
        mask_NC = mask_NC & ~rollout.truncated_N[:, None]
    chosen_NC = mask_NC
    if objective.top_entropy < 1 and mask_NC.any():
        readout = Readout(objective.sampling)
        entropy_NC = score_rollout(policy, rollout, readout, limit, ranks=ranks).entropy
        chosen_NC = top_entropy_mask(entropy_NC, mask_NC, objective.top_entropy)
    for iteration in range(objective.num_iterations):
        minibatch_B = assign_minibatches(
            len(rollout.prompts), objective.minibatches, seed + iteration
        )
        minibatch_N = minibatch_B.repeat_interleave(rollout.num_generation).to(mask_NC.device)
        tokens = Tokens(mask_NC, minibatch_N, objective.max_tokens)
        weights_NC = objective.averaging(tokens)
        counts_NC = chosen_NC
        if unscored_N is not None and unscored_N.any():
            counts_NC = chosen_NC * weigh_scored_only(unscored_N, tokens, objective.averaging)
        for index in range(objective.minibatches):
            prompts = (minibatch_B == index).nonzero()[:, 0].tolist()
            yield Minibatch(prompts, weights_NC * objective.minibatches, counts_NC)


def weigh_scored_only(unscored_N: Tensor, tokens: Tokens, averaging: Averaging) -> Tensor:
    """Returns [N, C] the weights over scored completions alone, divided by those over all."""
    counts_NC = torch.zeros_like(tokens.mask_NC, dtype=torch.float32)
    scored_N = ~unscored_N
    if scored_N.any():
        scored = Tokens(tokens.mask_NC[scored_N], tokens.minibatch_N[scored_N], tokens.max_tokens)
        quotient = averaging(scored) / averaging(tokens)[scored_N]
        counts_NC[scored_N] = quotient.masked_fill(~scored.mask_NC, 0.0)
    return counts_NC


def assign_minibatches(prompts: int, count: int, seed: int) -> Tensor:
    """Returns [B] each group's minibatch: a random split into sizes that differ by 1 at most."""
    generator = torch.Generator().manual_seed(seed % SEED_LIMIT)
    minibatch_B = torch.empty(prompts, dtype=torch.int64)
    minibatch_B[torch.randperm(prompts, generator=generator)] = torch.arange(prompts) % count
    return minibatch_B
