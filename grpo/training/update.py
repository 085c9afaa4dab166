"""Optimizer steps on one rollout; the gradients of its micro-batches add up exactly."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from grpo.memory.budget import TokenLimit
from grpo.memory.microbatch import (
    compute_reference_features,
    compute_within_limit,
    divide_prompts,
    plan_passes,
    release_features,
    score_rollout,
    select_completions,
    split_head_chunks,
    split_into_micro_batches,
)
from grpo.models.head import Readout
from grpo.models.load import LanguageModel
from grpo.models.reference import Reference
from grpo.models.sampling_filters import KeptTokens
from grpo.parallel import ONE_RANK, Ranks
from grpo.training.loss import (
    Minibatch,
    Objective,
    OldPolicy,
    UpdateInputs,
    compute_loss,
)
from grpo.training.minibatches import split_minibatches
from grpo.training.optimizer import Optimizer
from grpo.training.update_metrics import UpdateResult, UpdateTotals
from grpo.types import Rollout


def score_old_policy(
    policy: LanguageModel,
    objective: Objective,
    rollout: Rollout,
    limit: TokenLimit,
    ranks: Ranks = ONE_RANK,
) -> OldPolicy | None:
    """Returns the old log-probabilities for a step's ratios; None if the update computes them.

    With one update per rollout, old and new policy are the same, so each ratio is 1. With more, the
    policy scores the rollout once before the first, unless the sampler's log-probabilities are
    exact and cover the whole vocabulary.
    """
    if objective.updates == 1:
        return None
    if objective.sampling.truncates:
        kept = KeptTokens.create_empty(rollout.lengths_N, rollout.tokens_NC.shape[1])
        readout = Readout(objective.sampling)
        scores = score_rollout(policy, rollout, readout, limit, kept_tokens=kept, ranks=ranks)
        return OldPolicy(scores.logprobs, kept)
    if rollout.exact_logprobs:
        return OldPolicy(rollout.logprobs_NC)
    readout = Readout(objective.sampling)
    return OldPolicy(score_rollout(policy, rollout, readout, limit, ranks=ranks).logprobs)


def update_policy(
    policy: LanguageModel,
    reference: Reference | None,
    optimizer: Optimizer,
    objective: Objective,
    rollout: Rollout,
    update_inputs: UpdateInputs,
    limit: TokenLimit,
    seed: int = 0,
    ranks: Ranks = ONE_RANK,
) -> UpdateResult:
    """Takes `num_iterations` x `minibatches` optimizer steps and returns their metrics.

    Each token is weighted by its probability under the old policy / under the sampler, up to a cap:
    truncated importance weights, as in IMPALA (1802.01561). `sampler/kl` measures how far the two
    differ. Rows without a gradient are scored for the metrics, but need no backward pass.

    Args:
        seed: seeds the split into minibatches.
        ranks: each computes the gradients of a share of a minibatch's prompts.
    """
    totals = UpdateTotals(objective, rollout)
    for whole in split_minibatches(
        policy, objective, rollout, limit, seed, update_inputs.unscored_N, ranks
    ):
        minibatch = replace(whole, prompts=divide_prompts(rollout, whole.prompts, ranks))
        work = partial(
            add_gradients,
            policy,
            reference,
            objective,
            rollout,
            update_inputs,
            minibatch,
            limit,
            ranks,
        )
        compute = partial(
            compute_within_limit, policy, limit, work, ranks, optimizer.clear_gradients
        )
        for part in ranks.gather(compute):
            totals.merge(part)
        if not policy.is_sharded:  # its gradients are summed as they are computed
            ranks.sum_gradients(optimizer.parameters)
        totals.optimizer_metrics.append(optimizer.step())
    return totals.compute_result()


def add_gradients(
    policy: LanguageModel,
    reference: Reference | None,
    objective: Objective,
    rollout: Rollout,
    update_inputs: UpdateInputs,
    minibatch: Minibatch,
    limit: TokenLimit,
    ranks: Ranks = ONE_RANK,
) -> UpdateTotals:
    """Adds a minibatch's gradients to those of the weights; returns the sums for its metrics."""
    totals = UpdateTotals(objective, rollout)
    kept = None if update_inputs.old_policy is None else update_inputs.old_policy.kept
    batches = list(split_into_micro_batches(rollout, limit, minibatch.prompts))
    needed = [has_gradient(objective, update_inputs, minibatch, batch.rows) for batch in batches]
    for one in plan_passes(batches, needed, policy, ranks):
        batch, needs_gradient = one.batch, one.with_gradient
        limit.record_start(batch.tokens)
        inputs = select_completions(rollout, batch, policy, kept)
        reference_features = compute_reference_features(reference, objective.readout, inputs)
        if needs_gradient and not policy.is_sharded:
            allocate_gradients(policy.model)
        with torch.set_grad_enabled(needs_gradient):
            features = policy.compute_features(inputs)
            if not one.counts:
                if needs_gradient:
                    features.values_TX.backward(torch.zeros_like(features.values_TX))
                release_features(policy, reference)
                continue
            gradient_TX = []
            # The head runs forward and backward chunk by chunk, so a chunk's logits serve both.
            for rows, tokens in split_head_chunks(inputs, features.chunk_size):
                chunk, chunk_inputs = features.select_detached(tokens), inputs.select_rows(rows)
                reference_chunk = (
                    None if reference_features is None else reference_features.select_tokens(tokens)
                )
                scored = policy.score_features(
                    chunk, chunk_inputs, objective.readout, reference_chunk
                )
                loss = compute_loss(
                    objective,
                    rollout,
                    update_inputs,
                    minibatch,
                    batch.rows[rows],
                    chunk_inputs,
                    scored,
                )
                if needs_gradient:
                    loss.total.backward()
                    gradient_TX.append(cast(Tensor, chunk.values_TX.grad))
                totals.add(batch.rows[rows], loss, chunk_inputs.mask_NC, scored)
            if needs_gradient:
                features.values_TX.backward(torch.cat(gradient_TX))
        release_features(policy, reference)
    return totals


def allocate_gradients(model: nn.Module) -> None:
    """Gives each trained weight without a gradient a gradient of zeros.

    Gradients add up in place. Allocated here, they don't lie scattered among the activations, whose
    memory the next micro-batch reuses as one block.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def has_gradient(
    objective: Objective, update_inputs: UpdateInputs, minibatch: Minibatch, rows: Tensor
) -> bool:
    """Returns whether the loss of these rows has a gradient."""
    regularized = update_inputs.kl_weight > 0 or objective.entropy_weight > 0
    has_advantage = bool(update_inputs.advantages_N[rows].any())
    return (regularized or has_advantage) and bool((minibatch.weights_NC[rows] > 0).any())
