"""How a rollout's groups are split over optimizer steps, and what each token counts."""

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
) -> Iterator[Minibatch]:
    """Each of the optimizer steps that a rollout is worth, its groups split at random.

    The policy loss is averaged over the completions that have a reward. One without is not a zero
    among them: it would make every step smaller by the share of failed rewards. So verl averages
    over sequences that aren't masked. Groups that agree do count, as in the papers.
    """
    mask_NC = rollout.mask_NC
    if objective.mask_truncated:
        mask_NC = mask_NC & ~rollout.truncated_N[:, None]
    chosen_NC = mask_NC
    if objective.top_entropy < 1 and mask_NC.any():
        readout = Readout(objective.sampling)
        entropy_NC = score_rollout(policy, rollout, readout, limit).entropy
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
        for own in range(objective.minibatches):
            prompts = (minibatch_B == own).nonzero()[:, 0].tolist()
            yield Minibatch(prompts, weights_NC * objective.minibatches, counts_NC)


def weigh_scored_only(unscored_N: Tensor, tokens: Tokens, averaging: Averaging) -> Tensor:
    """[N, C] an average over the scored completions alone, in weights of that over all of them."""
    counts_NC = torch.zeros_like(tokens.mask_NC, dtype=torch.float32)
    own_N = ~unscored_N
    if own_N.any():
        own = Tokens(tokens.mask_NC[own_N], tokens.minibatch_N[own_N], tokens.max_tokens)
        share = averaging(own) / averaging(tokens)[own_N]
        counts_NC[own_N] = share.masked_fill(~own.mask_NC, 0.0)
    return counts_NC


def assign_minibatches(prompts: int, count: int, seed: int) -> Tensor:
    """[B] which of `count` minibatches each prompt's group is in: a random split, even to one."""
    generator = torch.Generator().manual_seed(seed % SEED_LIMIT)
    share_B = torch.empty(prompts, dtype=torch.int64)
    share_B[torch.randperm(prompts, generator=generator)] = torch.arange(prompts) % count
    return share_B
