"""Policy losses, one value a token; `weights` averages them.

Each takes the ratio [N, C] or [N, 1] with gradient, the log-probabilities [N, C] with gradient and
the advantages [N, 1]. On-policy the ratio is 1, and all have the gradient -advantage · ∇ log policy
(`sigmoid_gated` too: its slope at 1 is 1). Off-policy, when the ratio leaves 1, they differ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PolicyLoss(NamedTuple):
    """The loss of each token [N, C], or of each completion [N, 1]."""

    loss: Tensor
    clipped: Tensor  # bool: the ratio is out of bounds, on the side that the advantage clips


def clipped_surrogate(
    ratio: Tensor,
    logprobs_NC: Tensor,
    advantages_N1: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_dual: float | None = None,
) -> PolicyLoss:
    """Returns the negated clipped surrogate: PPO (1707.06347), eq. 7; 2402.03300, eq. 3.

    Args:
        clip_low, clip_high: clip the ratio to [1 - clip_low, 1 + clip_high]. A larger clip_high
            lets unlikely tokens become likelier: DAPO (2503.14476), eq. 10.
        clip_dual: the largest ratio if the advantage is negative: 1912.09729, eq. 5. None: no
            bound.
    """
    bounded = ratio if clip_dual is None else ratio.clamp(max=clip_dual)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate, clipped_surrogate = bounded * advantages_N1, clipped * advantages_N1
    past_dual = (bounded < ratio) & (advantages_N1 < 0)
    return PolicyLoss(
        -torch.minimum(surrogate, clipped_surrogate), (clipped_surrogate < surrogate) | past_dual
    )


def clipped_weight(
    ratio: Tensor, logprobs_NC: Tensor, advantages_N1: Tensor, ratio_max: float = 5.0
) -> PolicyLoss:
    """Returns CISPO's loss: the ratio, without gradient, is a weight of the log-probability.

    So a token above the bound is still trained, with a bounded weight: MiniMax-M1 (2506.13585),
    eq. 4.

    Args:
        ratio_max: the largest weight.
    """
    weight = ratio.detach().clamp(max=ratio_max)
    past = (ratio > ratio_max) & (advantages_N1 > 0)
    return PolicyLoss(-weight * advantages_N1 * logprobs_NC, past)


def sigmoid_gated(
    ratio: Tensor,
    logprobs_NC: Tensor,
    advantages_N1: Tensor,
    sharpness_positive: float = 1.0,
    sharpness_negative: float = 1.05,
) -> PolicyLoss:
    """Returns SAPO's loss: a sigmoid gate around ratio 1 replaces the clip (2511.20347, eq. 5, 6).

    Args:
        sharpness_positive, sharpness_negative: steepness of the gate for positive and for other
            advantages; the paper calls them temperatures.
    """
    sharpness = torch.where(advantages_N1 > 0, sharpness_positive, sharpness_negative)
    gate = torch.sigmoid(sharpness * (ratio - 1)) * 4 / sharpness
    return PolicyLoss(-gate * advantages_N1, torch.zeros_like(ratio, dtype=torch.bool))


def gamma_weight(
    ratio: Tensor,
    logprobs_NC: Tensor,
    advantages_N1: Tensor,
    power_positive: float = 2.0,
    decay_positive: float = 3.0,
    power_negative: float = 3.0,
    decay_negative: float = 2.0,
) -> PolicyLoss:
    """Returns VESPO's loss (2602.10693): it weights a sequence of ratio w by w^k · e^(λ(1-w)).

    The weight has no gradient.

    Args:
        power_*: k, how fast the weight falls for ratios below 1; positive is for advantages >= 0.
        decay_*: λ, how fast it falls for ratios above 1.
    """
    rises = advantages_N1 >= 0
    power = torch.where(rises, power_positive, power_negative)
    decay = torch.where(rises, decay_positive, decay_negative)
    with torch.no_grad():
        weight = torch.exp(decay + power * ratio.log() - decay * ratio)
    return PolicyLoss(
        -weight * advantages_N1 * logprobs_NC, torch.zeros_like(weight, dtype=torch.bool)
    )


def policy_gradient(ratio: Tensor, logprobs_NC: Tensor, advantages_N1: Tensor) -> PolicyLoss:
    """Returns REINFORCE's loss, -advantage · log policy, without ratio: GPG (2504.02546), eq. 5."""
    return PolicyLoss(-advantages_N1 * logprobs_NC, torch.zeros_like(logprobs_NC, dtype=torch.bool))
