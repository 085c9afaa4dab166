"""Optimizer steps from one rollout: loss and gradient in micro-batches that add up exactly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from grpo.budget import Limit
from grpo.models.forward import Completions
from grpo.models.head import Readout, TokenScores
from grpo.models.load import LanguageModel
from grpo.models.reference import Reference
from grpo.objective import ESTIMATORS, PolicyLoss, Tokens, most_uncertain
from grpo.objective.kl import Divergence, Estimator
from grpo.objective.ratios import Ratio
from grpo.objective.weights import Averaging
from grpo.optim import Optimizer
from grpo.pieces import completions, micro_batches, other_side, read_at_once, score_rollout
from grpo.seeds import SEEDS
from grpo.types import Rollout, Sampling

CHEAP_ESTIMATORS = ESTIMATORS["reverse"]  # all logged, whichever is trained on


@dataclass(frozen=True)
class KLTerm:
    """How the divergence from the reference is worked out; exactly one of the two is there."""

    estimator: Estimator | None  # from the log-probabilities of the sampled tokens
    divergence: Divergence | None  # from whole distributions
    in_reward: bool  # taken off the reward before the advantage, instead of added to the loss
    unbiased_gradient: bool  # weighed by the ratio, with its gradient: DeepSeek-V3.2 (2512.02556)

    def tokens(self, scored: TokenScores, reference_NC: Tensor) -> Tensor:
        """[N, C] nats, by token."""
        if self.estimator is None:
            return scored.divergence
        return self.estimator(scored.plain, reference_NC)


@dataclass(frozen=True)
class Objective:
    """What is minimised: sum over tokens of weight · (policy loss + w · KL - v · entropy)."""

    ratio: Ratio
    policy_loss: Callable[[Tensor, Tensor, Tensor], PolicyLoss]  # ratio, logprobs, advantages
    averaging: Averaging
    kl: KLTerm | None
    sampling: Sampling
    max_tokens: int  # the longest that a completion may be
    entropy_weight: float = 0.0
    mask_truncated: bool = False  # completions that were cut off are not trained on
    top_entropy: float = 1.0  # only this share of the tokens, the least certain, is trained on
    importance_cap: float = 2.0  # what a token counts for at most, where another model sampled it
    num_iterations: int = 1  # passes over a rollout
    minibatches: int = 1  # optimizer steps a pass

    @property
    def readout(self) -> Readout:
        """What the loss asks of the policy's distributions."""
        divergence = self.kl.divergence if self.kl else None
        return Readout(self.sampling, self.entropy_weight > 0, divergence)


@dataclass(frozen=True)
class Learned:
    """What an update learns from, [N] or [N, C]."""

    advantages_N: Tensor
    reference_NC: Tensor | None  # the reference's log-probabilities; None where the update has them
    kl_weight: float  # of the KL in the loss


@dataclass(frozen=True)
class Updated:
    """What an update was made of."""

    metrics: dict[str, float]
    ratios_T: Tensor  # of every completion token, as often as it was read, on the CPU


@dataclass(frozen=True)
class Minibatch:
    """The groups of one optimizer step, and what each token of the rollout counts in its loss."""

    prompts: list[int]  # indices into B
    weights_NC: Tensor  # those of all minibatches sum to their number
    chosen_NC: Tensor  # bool: the tokens that the policy loss is taken on


def minibatches(
    policy: LanguageModel, objective: Objective, rollout: Rollout, limit: Limit, seed: int
) -> Iterator[Minibatch]:
    """Each of the optimizer steps that a rollout is worth, its groups split at random."""
    mask_NC = rollout.mask_NC
    if objective.mask_truncated:
        mask_NC = mask_NC & ~rollout.truncated_N[:, None]
    chosen_NC = mask_NC
    if objective.top_entropy < 1 and mask_NC.any():
        readout = Readout(objective.sampling)
        entropy_NC = score_rollout(policy, rollout, readout, limit).entropy
        chosen_NC = most_uncertain(entropy_NC, mask_NC, objective.top_entropy)
    for iteration in range(objective.num_iterations):
        minibatch_B = minibatch_of(len(rollout.prompts), objective.minibatches, seed + iteration)
        minibatch_N = minibatch_B.repeat_interleave(rollout.num_generation).to(mask_NC.device)
        weights_NC = objective.averaging(Tokens(mask_NC, minibatch_N, objective.max_tokens))
        for own in range(objective.minibatches):
            prompts = (minibatch_B == own).nonzero()[:, 0].tolist()
            yield Minibatch(prompts, weights_NC * objective.minibatches, chosen_NC)


def minibatch_of(prompts: int, count: int, seed: int) -> Tensor:
    """[B] which of `count` minibatches each prompt's group is in: a random split, even to one."""
    generator = torch.Generator().manual_seed(seed % SEEDS)
    share_B = torch.empty(prompts, dtype=torch.int64)
    share_B[torch.randperm(prompts, generator=generator)] = torch.arange(prompts) % count
    return share_B


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

    The old log-probabilities are the policy's at the time of the rollout, so `policy/ratio_max`
    shows any difference between sampling and training. Groups that nothing gives a gradient are
    read for the metrics, and cost no backward.

    Args:
        seed: of the split into minibatches.
    """
    totals = Totals(objective)
    for minibatch in minibatches(policy, objective, rollout, limit, seed):

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
    totals = Totals(objective)
    for batch in micro_batches(rollout, limit, minibatch.prompts):
        limit.starts(batch.tokens)
        inputs = completions(rollout, batch, policy)
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
                totals.add(loss, some.mask_NC, scored)
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


@dataclass(frozen=True)
class MicroLoss:
    """Some completions' share of the loss, and what it was made of."""

    policy: Tensor
    kl: Tensor  # weighed
    entropy: Tensor  # weighed, negative
    ratio_NC: Tensor
    clipped_NC: Tensor
    kl_NC: Tensor | None
    reference_NC: Tensor | None

    @property
    def total(self) -> Tensor:
        return self.policy + self.kl + self.entropy


def losses(
    objective: Objective,
    rollout: Rollout,
    learned: Learned,
    minibatch: Minibatch,
    rows: Tensor,
    inputs: Completions,
    scored: TokenScores,
) -> MicroLoss:
    """The loss of some rows: DeepSeekMath (2402.03300), eq. 3, or what was chosen for its parts."""
    width = inputs.tokens_NC.shape[1]
    old_NC = rollout.logprobs_NC[rows, :width]
    weights_NC = minibatch.weights_NC[rows, :width]
    chosen_NC = weights_NC * minibatch.chosen_NC[rows, :width]
    importance_NC = rollout.importance_NC
    policy_NC = chosen_NC
    if importance_NC is not None:
        policy_NC = chosen_NC * importance_NC[rows, :width].clamp(max=objective.importance_cap)
    ratio = objective.ratio(scored.logprobs, old_NC, inputs.mask_NC)
    token = objective.policy_loss(ratio, scored.logprobs, learned.advantages_N[rows, None])
    token_ratio_NC = torch.exp(scored.logprobs - old_NC)
    kl_loss = torch.zeros((), device=old_NC.device)
    kl_NC = reference_NC = None
    if objective.kl is not None and learned.reference_NC is not None:
        reference_NC = learned.reference_NC[rows, :width]
    elif objective.kl is not None and objective.kl.divergence is not None:
        reference_NC = scored.reference
    if objective.kl is not None and reference_NC is not None:
        kl_NC = objective.kl.tokens(scored, reference_NC)
        weighed_NC = kl_NC * token_ratio_NC if objective.kl.unbiased_gradient else kl_NC
        kl_loss = learned.kl_weight * (weights_NC * weighed_NC).sum()
    return MicroLoss(
        policy=(policy_NC * token.loss).sum(),
        kl=kl_loss,
        entropy=-objective.entropy_weight * (chosen_NC * scored.entropy).sum(),
        ratio_NC=token_ratio_NC.detach(),
        clipped_NC=token.clipped.expand_as(inputs.mask_NC),
        kl_NC=None if kl_NC is None else kl_NC.detach(),
        reference_NC=reference_NC,
    )


class Totals:
    """Sums over a step's completion tokens and updates, made into means at the end."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.tokens = 0
        self.sums: dict[str, float] = defaultdict(float)
        self.losses: dict[str, float] = defaultdict(float)
        self.ratios: list[Tensor] = []
        self.updates: list[dict[str, float]] = []  # what the optimizer said of each

    @torch.no_grad()
    def add(self, loss: MicroLoss, mask_NC: Tensor, scored: TokenScores) -> None:
        self.tokens += int(mask_NC.sum())
        self.losses["loss/total"] += float(loss.total)
        self.losses["loss/policy"] += float(loss.policy)
        self.losses["loss/kl"] += float(loss.kl)
        if self.objective.entropy_weight > 0:
            self.losses["loss/entropy"] += float(loss.entropy)
        self.ratios.append(loss.ratio_NC[mask_NC].cpu())
        self.sums["policy/entropy"] += float(scored.entropy[mask_NC].double().sum())
        self.sums["policy/clip_fraction"] += float(loss.clipped_NC[mask_NC].sum())
        if loss.kl_NC is None or loss.reference_NC is None:
            return
        self.sums["kl/mean"] += float(loss.kl_NC[mask_NC].double().sum())
        plain_T, reference_T = scored.plain[mask_NC].double(), loss.reference_NC[mask_NC].double()
        for name, estimator in CHEAP_ESTIMATORS.items():
            self.sums[f"kl/{name}"] += float(estimator(plain_T, reference_T).sum())
        if self.objective.readout.divergence is not None:
            self.sums["kl/full"] += float(scored.divergence[mask_NC].double().sum())

    def take(self, others: Totals) -> None:
        """Those of a minibatch."""
        self.tokens += others.tokens
        self.ratios += others.ratios
        for own, more in ((self.sums, others.sums), (self.losses, others.losses)):
            for name, value in more.items():
                own[name] += value

    def updated(self) -> Updated:
        """Means over tokens, and over updates; the largest ratio of all."""
        steps, ratios_T = len(self.updates), torch.cat(self.ratios)
        metrics = {
            **{name: total / steps for name, total in self.losses.items()},
            **{name: total / self.tokens for name, total in self.sums.items()},
            "policy/ratio_max": float(ratios_T.max()),
            **{name: sum(u[name] for u in self.updates) / steps for name in self.updates[0]},
        }
        return Updated(metrics, ratios_T)
