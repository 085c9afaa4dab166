"""The loss of some completions, and what it is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from grpo.models.forward import Completions
from grpo.models.head import Readout, TokenScores
from grpo.models.sampling_filters import KeptTokens
from grpo.objective import ESTIMATORS, PolicyLoss
from grpo.objective.kl import Divergence, Estimator
from grpo.objective.ratios import Ratio
from grpo.objective.weights import Averaging
from grpo.types import Rollout, Sampling

LOGGED_ESTIMATORS = ESTIMATORS["reverse"]  # all logged, whichever is trained on


@dataclass(frozen=True)
class KLTerm:
    """How the divergence from the reference is worked out; exactly one of the two is there."""

    estimator: Estimator | None  # from the log-probabilities of the sampled tokens
    divergence: Divergence | None  # from whole distributions
    in_reward: bool  # taken off the reward before the advantage, instead of added to the loss
    unbiased_gradient: bool  # weighed by the ratio, with its gradient: DeepSeek-V3.2 (2512.02556)

    def token_kl(self, scored: TokenScores, reference_NC: Tensor) -> Tensor:
        """[N, C] nats, by token."""
        if self.estimator is None:
            return scored.divergence
        return self.estimator(scored.plain_logprobs, reference_NC)


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


@dataclass(frozen=True)
class UpdateInputs:
    """What an update learns from, [N] or [N, C]."""

    advantages_N: Tensor
    old_policy: OldPolicy | None  # None: the policy has not moved, and each token's ratio is 1
    reference_NC: Tensor | None  # the reference's log-probabilities; None where the update has them
    kl_weight: float  # of the KL in the loss
    unscored_N: Tensor | None = None  # bool: without a reward, so only the KL is taken on them


@dataclass(frozen=True)
class Minibatch:
    """The groups of one optimizer step, and what each token of the rollout counts in its loss."""

    prompts: list[int]  # indices into B
    weights_NC: Tensor  # those of all minibatches sum to their number
    policy_factor_NC: (
        Tensor  # in the policy loss it counts so many times that; 0: it isn't taken on it
    )


@dataclass(frozen=True)
class MicroBatchLoss:
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


def compute_loss(
    objective: Objective,
    rollout: Rollout,
    update_inputs: UpdateInputs,
    minibatch: Minibatch,
    rows: Tensor,
    inputs: Completions,
    scored: TokenScores,
) -> MicroBatchLoss:
    """The loss of some rows: DeepSeekMath (2402.03300), eq. 3, or what was chosen for its parts."""
    width = inputs.tokens_NC.shape[1]
    before = update_inputs.old_policy
    old_NC = scored.logprobs.detach() if before is None else before.logprobs_NC[rows, :width]
    weights_NC = minibatch.weights_NC[rows, :width]
    chosen_NC = weights_NC * minibatch.policy_factor_NC[rows, :width]
    importance_NC = old_NC - rollout.logprobs_NC[rows, :width]
    policy_NC = chosen_NC * importance_NC.exp().clamp(max=objective.importance_cap)
    ratio = objective.ratio(scored.logprobs, old_NC, inputs.mask_NC)
    token = objective.policy_loss(ratio, scored.logprobs, update_inputs.advantages_N[rows, None])
    token_ratio_NC = torch.exp(scored.logprobs - old_NC)
    kl_loss = torch.zeros((), device=old_NC.device)
    kl_NC = reference_NC = None
    if objective.kl is not None and update_inputs.reference_NC is not None:
        reference_NC = update_inputs.reference_NC[rows, :width]
    elif objective.kl is not None and objective.kl.divergence is not None:
        reference_NC = scored.reference
    if objective.kl is not None and reference_NC is not None:
        kl_NC = objective.kl.token_kl(scored, reference_NC)
        weighed_NC = kl_NC * token_ratio_NC if objective.kl.unbiased_gradient else kl_NC
        kl_loss = update_inputs.kl_weight * (weights_NC * weighed_NC).sum()
    return MicroBatchLoss(
        policy=(policy_NC * token.loss).sum(),
        kl=kl_loss,
        entropy=-objective.entropy_weight * (chosen_NC * scored.entropy).sum(),
        ratio_NC=token_ratio_NC.detach(),
        importance_NC=importance_NC,
        clipped_NC=token.clipped.expand_as(inputs.mask_NC),
        kl_NC=None if kl_NC is None else kl_NC.detach(),
        reference_NC=reference_NC,
    )
