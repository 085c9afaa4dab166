"""The loss of a micro-batch, and its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from grpo.models.forward import Completions
from grpo.models.head import Readout, TokenScores
from grpo.models.sampling_filters import KeptTokens
from grpo.objective import ESTIMATORS, OffPolicyCorrection, PolicyLoss
from grpo.objective.kl import Divergence, Estimator
from grpo.objective.ratios import Ratio
from grpo.objective.weights import Averaging
from grpo.types import Rollout, Sampling

USUAL_CORRECTION = OffPolicyCorrection()
LOGGED_ESTIMATORS = ESTIMATORS["reverse"]  # all logged, whichever is trained on


@dataclass(frozen=True)
class KLTerm:
    """How the KL from the reference is computed; `estimator` or `divergence` is None, not both."""

    estimator: Estimator | None  # from the log-probabilities of the sampled tokens
    divergence: Divergence | None  # from whole distributions
    in_reward: bool  # subtracted from the reward before the advantage, not added to the loss
    unbiased_gradient: bool  # multiplied by the ratio, with its gradient: 2512.02556

    def token_kl(self, scored: TokenScores, reference_NC: Tensor) -> Tensor:
        """Returns [N, C] the KL of each token in nats."""
        if self.estimator is None:
            return scored.divergence
        return self.estimator(scored.plain_logprobs, reference_NC)


@dataclass(frozen=True)
class Objective:
    """The loss to minimize: sum over tokens of weight · (policy loss + w · KL - v · entropy)."""

    ratio: Ratio
    policy_loss: Callable[[Tensor, Tensor, Tensor], PolicyLoss]  # ratio, logprobs, advantages
    averaging: Averaging
    kl: KLTerm | None
    sampling: Sampling
    max_tokens: int  # maximum length of a completion
    entropy_weight: float = 0.0
    mask_truncated: bool = False  # truncated completions are not trained on
    top_entropy: float = 1.0  # the share of tokens, of highest entropy, that keep the policy loss
    correction: OffPolicyCorrection = USUAL_CORRECTION  # where the sampler differs
    num_iterations: int = 1  # passes over a rollout
    minibatches: int = 1  # optimizer steps per pass

    @property
    def updates(self) -> int:
        """Optimizer steps per rollout."""
        return self.num_iterations * self.minibatches

    @property
    def readout(self) -> Readout:
        """What the loss needs of the policy's distributions."""
        divergence = self.kl.divergence if self.kl else None
        return Readout(self.sampling, self.entropy_weight > 0, divergence)


class OldPolicy(NamedTuple):
    """Scores by the policy before the first update of a step, through the update's forward pass."""

    logprobs_NC: Tensor
    kept: KeptTokens | None = None  # the tokens that top-k, top-p or min-p kept


@dataclass(frozen=True)
class UpdateInputs:
    """The inputs of an update beside the rollout, [N] or [N, C]."""

    advantages_N: Tensor
    old_policy: OldPolicy | None  # None: the policy has not changed, so each token's ratio is 1
    reference_NC: Tensor | None  # its log-probabilities; None: no KL, or the update computes it
    kl_weight: float  # of the KL in the loss
    unscored_N: Tensor | None = None  # bool: without a reward, so trained by the KL only


@dataclass(frozen=True)
class Minibatch:
    """The groups of one optimizer step, and the weight of each token of the rollout in its loss."""

    prompts: list[int]  # indices into B
    weights_NC: Tensor  # multiplied by the number of minibatches
    policy_factor_NC: Tensor  # multiplies the weight in the policy loss; 0: not trained by it


@dataclass(frozen=True)
class MicroBatchLoss:
    """A micro-batch's share of a minibatch's loss, and the parts of that share."""

    policy: Tensor
    kl: Tensor  # weighted
    entropy: Tensor  # weighted, negative
    ratio_NC: Tensor
    importance_NC: Tensor  # log of old policy's probability / sampler's probability
    dropped_NC: Tensor  # bool: left out by the correction
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
    """Computes the loss of some rows: DeepSeekMath (2402.03300), eq. 3, with configured parts."""
    width = inputs.tokens_NC.shape[1]
    old_policy = update_inputs.old_policy
    old_NC = (
        scored.logprobs.detach() if old_policy is None else old_policy.logprobs_NC[rows, :width]
    )
    weights_NC = minibatch.weights_NC[rows, :width]
    policy_weights_NC = weights_NC * minibatch.policy_factor_NC[rows, :width]
    sampler_NC, mask_NC = rollout.logprobs_NC[rows, :width], inputs.mask_NC
    advantages_N1 = update_inputs.advantages_N[rows, None]
    correction = objective.correction
    kept_N1 = correction.keep(scored.logprobs, sampler_NC, mask_NC, advantages_N1)
    counts_NC = correction.weigh(old_NC, sampler_NC, mask_NC) * kept_N1
    policy_NC = policy_weights_NC * counts_NC
    ratio = objective.ratio(scored.logprobs, old_NC, mask_NC)
    token = objective.policy_loss(ratio, scored.logprobs, advantages_N1)
    token_ratio_NC = torch.exp(scored.logprobs - old_NC)
    kl_loss = torch.zeros((), device=old_NC.device)
    kl_NC = reference_NC = None
    if objective.kl is not None and update_inputs.reference_NC is not None:
        reference_NC = update_inputs.reference_NC[rows, :width]
    elif objective.kl is not None and objective.kl.divergence is not None:
        reference_NC = scored.reference
    if objective.kl is not None and reference_NC is not None:
        kl_NC = objective.kl.token_kl(scored, reference_NC)
        ratio_kl_NC = kl_NC * token_ratio_NC if objective.kl.unbiased_gradient else kl_NC
        kl_loss = update_inputs.kl_weight * (weights_NC * ratio_kl_NC).sum()
    return MicroBatchLoss(
        policy=(policy_NC * token.loss).sum(),
        kl=kl_loss,
        entropy=-objective.entropy_weight * (policy_weights_NC * scored.entropy).sum(),
        ratio_NC=token_ratio_NC.detach(),
        importance_NC=old_NC - sampler_NC,
        dropped_NC=(counts_NC == 0).expand_as(mask_NC),
        clipped_NC=token.clipped.expand_as(mask_NC),
        kl_NC=None if kl_NC is None else kl_NC.detach(),
        reference_NC=reference_NC,
    )
