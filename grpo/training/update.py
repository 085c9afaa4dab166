"""Optimizer steps from one rollout: loss and gradient in micro-batches that add up exactly."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from grpo.memory.budget import Limit
from grpo.memory.microbatch import (
    completions,
    micro_batches,
    other_side,
    read_at_once,
    score_rollout,
)
from grpo.models.head import Readout
from grpo.models.load import LanguageModel
from grpo.models.reference import Reference
from grpo.models.sampling_filters import KeptTokens
from grpo.training.loss import (
    Learned,
    Minibatch,
    Objective,
    OldPolicy,
    losses,
)
from grpo.training.minibatches import minibatches
from grpo.training.optimizer import Optimizer
from grpo.training.totals import Totals, Updated
from grpo.types import Rollout


def old_policy(
    policy: LanguageModel, objective: Objective, rollout: Rollout, limit: Limit
) -> OldPolicy | None:
    """What the ratios of a step are taken to; None where that is the update's own forward pass.

    With one update the policy is still the one that sampled: its ratio is 1. With more, the policy
    is read once before the first, unless the sampler's log-probabilities are its own.
    """
    if objective.updates == 1:
        return None
    if objective.sampling.truncates:
        kept = KeptTokens.of(rollout.lengths_N, rollout.tokens_NC.shape[1])
        readout = Readout(objective.sampling)
        return OldPolicy(score_rollout(policy, rollout, readout, limit, kept=kept).logprobs, kept)
    if rollout.exact:
        return OldPolicy(rollout.logprobs_NC)
    return OldPolicy(score_rollout(policy, rollout, Readout(objective.sampling), limit).logprobs)


def update(
    policy: LanguageModel,
    reference: Reference | None,
    optimizer: Optimizer,
    objective: Objective,
    rollout: Rollout,
    learned: Learned,
    limit: Limit,
    seed: int = 0,
) -> Updated:
    """Takes `num_iterations` x `minibatches` optimizer steps and says what they were made of.

    A token counts by how likely the old policy found it, next to its sampler, up to a cap:
    truncated importance weights, as IMPALA's (1802.01561). `sampler/kl` says how far the two were
    apart. Groups that nothing gives a gradient are read for the metrics, and cost no backward.

    Args:
        seed: of the split into minibatches.
    """
    totals = Totals(objective, rollout)
    for minibatch in minibatches(policy, objective, rollout, limit, seed, learned.unscored_N):

        def work(minibatch: Minibatch = minibatch) -> Totals:
            return gradients(policy, reference, objective, rollout, learned, minibatch, limit)

        totals.take(limit.fitting(work, undo=optimizer.forget))
        totals.updates.append(optimizer.step())
    return totals.updated()


def gradients(
    policy: LanguageModel,
    reference: Reference | None,
    objective: Objective,
    rollout: Rollout,
    learned: Learned,
    minibatch: Minibatch,
    limit: Limit,
) -> Totals:
    """Adds a minibatch's gradients to what the weights have, and says what the loss was made of."""
    totals = Totals(objective, rollout)
    kept = None if learned.old is None else learned.old.kept
    for batch in micro_batches(rollout, limit, minibatch.prompts):
        limit.starts(batch.tokens)
        inputs = completions(rollout, batch, policy, kept)
        against = other_side(reference, objective.readout, inputs)
        learns = has_gradient(objective, learned, minibatch, batch.rows)
        if learns:
            make_room(policy.model)
        with torch.set_grad_enabled(learns):
            features = policy.features(inputs)
            gradient_TX = []
            # Forward and backward through the head by parts, so that a part's logits serve both.
            for rows, tokens in read_at_once(inputs, features.rows):
                own, some = features.cut_off(tokens), inputs.part(rows)
                other = None if against is None else against.part(tokens)
                scored = policy.read(own, some, objective.readout, other)
                loss = losses(
                    objective, rollout, learned, minibatch, batch.rows[rows], some, scored
                )
                if learns:
                    loss.total.backward()
                    gradient_TX.append(cast(Tensor, own.values_TX.grad))
                totals.add(batch.rows[rows], loss, some.mask_NC, scored)
            if learns:
                features.values_TX.backward(torch.cat(gradient_TX))
    return totals


def make_room(model: nn.Module) -> None:
    """Gives each trained weight a gradient of zeros, where it has none.

    Gradients are added up in place; made here, they don't lie scattered among the activations,
    whose memory the next micro-batch takes as a whole.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def has_gradient(
    objective: Objective, learned: Learned, minibatch: Minibatch, rows: Tensor
) -> bool:
    """Whether anything of the loss depends on the policy at these rows."""
    everywhere = learned.kl_weight > 0 or objective.entropy_weight > 0
    taught = bool(learned.advantages_N[rows].any())
    return (everywhere or taught) and bool((minibatch.weights_NC[rows] > 0).any())
