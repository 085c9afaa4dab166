"""Optimizer steps from one rollout: loss and gradient in micro-batches that add up exactly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import fsum
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from grpo.memory.budget import Limit
from grpo.models.forward import Completions
from grpo.models.head import Readout, TokenScores
from grpo.models.load import LanguageModel
from grpo.models.microbatch import (
    completions,
    micro_batches,
    other_side,
    read_at_once,
    score_rollout,
)
from grpo.models.reference import Reference
from grpo.models.sampling_filters import KeptTokens
from grpo.objective import ESTIMATORS, PolicyLoss, Tokens, most_uncertain
from grpo.objective.kl import Divergence, Estimator
from grpo.objective.ratios import Ratio
from grpo.objective.weights import Averaging
from grpo.seeds import SEEDS
from grpo.training.optimizer import Optimizer
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
    importance_cap: float = 2.0  # what a token counts for at most, where its sampler differs
    num_iterations: int = 1  # passes over a rollout
    minibatches: int = 1  # optimizer steps a pass

    @property
    def updates(self) -> int:
        """Optimizer steps a rollout."""
        return self.num_iterations * self.minibatches

    @property
    def readout(self) -> Readout:
        """What the loss asks of the policy's distributions."""
        divergence = self.kl.divergence if self.kl else None
        return Readout(self.sampling, self.entropy_weight > 0, divergence)


class OldPolicy(NamedTuple):
    """The policy before the first update of a step, by the forward pass that the update uses."""

    logprobs_NC: Tensor
    kept: KeptTokens | None = None  # what top-k, top-p or min-p left of the vocabulary


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


@dataclass(frozen=True)
class Learned:
    """What an update learns from, [N] or [N, C]."""

    advantages_N: Tensor
    old: OldPolicy | None  # None: the policy has not moved, and each token's ratio is 1
    reference_NC: Tensor | None  # the reference's log-probabilities; None where the update has them
    kl_weight: float  # of the KL in the loss
    unscored_N: Tensor | None = None  # bool: without a reward, so only the KL is taken on them


@dataclass(frozen=True)
class Updated:
    """What an update was made of."""

    metrics: dict[str, float]
    ratios_T: Tensor  # of every completion token, as often as it was read, on the CPU
    log_ratio_NC: Tensor | None  # policy to reference before the first update, on the CPU


@dataclass(frozen=True)
class Minibatch:
    """The groups of one optimizer step, and what each token of the rollout counts in its loss."""

    prompts: list[int]  # indices into B
    weights_NC: Tensor  # those of all minibatches sum to their number
    chosen_NC: Tensor  # in the policy loss it counts so many times that; 0: it isn't taken on it


def minibatches(
    policy: LanguageModel,
    objective: Objective,
    rollout: Rollout,
    limit: Limit,
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
        chosen_NC = most_uncertain(entropy_NC, mask_NC, objective.top_entropy)
    for iteration in range(objective.num_iterations):
        minibatch_B = minibatch_of(len(rollout.prompts), objective.minibatches, seed + iteration)
        minibatch_N = minibatch_B.repeat_interleave(rollout.num_generation).to(mask_NC.device)
        tokens = Tokens(mask_NC, minibatch_N, objective.max_tokens)
        weights_NC = objective.averaging(tokens)
        counts_NC = chosen_NC
        if unscored_N is not None and unscored_N.any():
            counts_NC = chosen_NC * counts_without(unscored_N, tokens, objective.averaging)
        for own in range(objective.minibatches):
            prompts = (minibatch_B == own).nonzero()[:, 0].tolist()
            yield Minibatch(prompts, weights_NC * objective.minibatches, counts_NC)


def counts_without(unscored_N: Tensor, tokens: Tokens, averaging: Averaging) -> Tensor:
    """[N, C] an average over the scored completions alone, in weights of that over all of them."""
    counts_NC = torch.zeros_like(tokens.mask_NC, dtype=torch.float32)
    own_N = ~unscored_N
    if own_N.any():
        own = Tokens(tokens.mask_NC[own_N], tokens.minibatch_N[own_N], tokens.max_tokens)
        share = averaging(own) / averaging(tokens)[own_N]
        counts_NC[own_N] = share.masked_fill(~own.mask_NC, 0.0)
    return counts_NC


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


@dataclass(frozen=True)
class MicroLoss:
    """Some completions' share of the loss, and what it was made of."""

    policy: Tensor
    kl: Tensor  # weighed
    entropy: Tensor  # weighed, negative
    ratio_NC: Tensor
    importance_NC: Tensor  # log of how much likelier the old policy found a token than its sampler
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
    before = learned.old
    old_NC = scored.logprobs.detach() if before is None else before.logprobs_NC[rows, :width]
    weights_NC = minibatch.weights_NC[rows, :width]
    chosen_NC = weights_NC * minibatch.chosen_NC[rows, :width]
    importance_NC = old_NC - rollout.logprobs_NC[rows, :width]
    policy_NC = chosen_NC * importance_NC.exp().clamp(max=objective.importance_cap)
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
        importance_NC=importance_NC,
        clipped_NC=token.clipped.expand_as(inputs.mask_NC),
        kl_NC=None if kl_NC is None else kl_NC.detach(),
        reference_NC=reference_NC,
    )


class Totals:
    """Sums over a step's completion tokens and updates, made into means at the end.

    They stay on the device, in fp32, until then, so that nothing waits for it.
    """

    def __init__(self, objective: Objective, rollout: Rollout) -> None:
        self.objective = objective
        self.parts: dict[str, list[Tensor]] = defaultdict(list)  # sums over tokens
        self.losses: dict[str, list[Tensor]] = defaultdict(list)
        self.tokens: list[Tensor] = []
        self.ratios: list[Tensor] = []
        self.importance: list[Tensor] = []
        self.updates: list[dict[str, float]] = []  # what the optimizer said of each
        self.log_ratio_NC = torch.full_like(rollout.logprobs_NC, torch.nan)

    @torch.no_grad()
    def add(self, rows: Tensor, loss: MicroLoss, mask_NC: Tensor, scored: TokenScores) -> None:
        """Takes in what was read of these rows."""
        self.tokens.append(mask_NC.sum())
        self.losses["loss/total"].append(loss.total.detach())
        self.losses["loss/policy"].append(loss.policy.detach())
        self.losses["loss/kl"].append(loss.kl.detach())
        if self.objective.entropy_weight > 0:
            self.losses["loss/entropy"].append(loss.entropy.detach())
        self.ratios.append(loss.ratio_NC[mask_NC])
        self.importance.append(loss.importance_NC[mask_NC])
        self._sum("policy/entropy", scored.entropy[mask_NC])
        self._sum("policy/clip_fraction", loss.clipped_NC[mask_NC].float())
        if loss.kl_NC is None or loss.reference_NC is None:
            return
        self._sum("kl/mean", loss.kl_NC[mask_NC])
        plain_T, reference_T = scored.plain[mask_NC], loss.reference_NC[mask_NC]
        for name, estimator in CHEAP_ESTIMATORS.items():
            self._sum(f"kl/{name}", estimator(plain_T, reference_T))
        if self.objective.readout.divergence is not None:
            self._sum("kl/full", scored.divergence[mask_NC])
        self.log_ratio_NC[rows, : mask_NC.shape[1]] = scored.plain - loss.reference_NC

    def _sum(self, name: str, values_T: Tensor) -> None:
        self.parts[name].append(values_T.sum())

    def take(self, others: Totals) -> None:
        """Those of a minibatch; what was said of a row before its first update stays."""
        self.tokens += others.tokens
        self.ratios += others.ratios
        self.importance += others.importance
        for own, more in ((self.parts, others.parts), (self.losses, others.losses)):
            for name, values in more.items():
                own[name] += values
        unread_NC = self.log_ratio_NC.isnan()
        self.log_ratio_NC = torch.where(unread_NC, others.log_ratio_NC, self.log_ratio_NC)

    def updated(self) -> Updated:
        """Means over tokens, and over updates; the largest ratio of all."""
        steps, ratios_T = len(self.updates), torch.cat(self.ratios).cpu()
        tokens, log_T = total(self.tokens), torch.cat(self.importance).cpu()
        metrics = {
            **{name: total(values) / steps for name, values in self.losses.items()},
            **{name: total(values) / tokens for name, values in self.parts.items()},
            "policy/ratio_max": float(ratios_T.max()),
            "sampler/kl": float((log_T.expm1() - log_T).mean()),  # k3: sampler to policy
            "sampler/importance_min": float(log_T.min().exp()),
            "sampler/importance_max": float(log_T.max().exp()),
            **{name: sum(u[name] for u in self.updates) / steps for name in self.updates[0]},
        }
        has_reference = "kl/mean" in self.parts
        return Updated(metrics, ratios_T, self.log_ratio_NC.cpu() if has_reference else None)


def total(parts: Sequence[Tensor]) -> float:
    """The sum of numbers that are on a device, fetched together."""
    return fsum(torch.stack(list(parts)).tolist())
