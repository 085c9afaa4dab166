"""Policy losses, one value a token. What averages them is in `weights`.

Each takes the ratio [N, C] or [N, 1] with gradient, the log-probabilities [N, C] with gradient and
the advantages [N, 1]. On-policy the ratio is 1, and all have the gradient -advantage · ∇ log policy
(`sigmoid_gated` too: its slope at 1 is 1); they differ in what happens as the policy moves away.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PolicyLoss(NamedTuple):
    """A policy loss by token, [N, C] or [N, 1]."""

    loss: Tensor
    clipped: Tensor  # bool: the ratio was past its bounds, on the side where that matters


def clipped_surrogate(
    ratio: Tensor,
    logprobs_NC: Tensor,
    advantages_N1: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_dual: float | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate, negated: PPO (1707.06347), eq. 7; DeepSeekMath (2402.03300), eq. 3.

    Args:
        clip_low, clip_high: the ratio counts between 1 - clip_low and 1 + clip_high; a wider one
            above lets unlikely tokens grow: DAPO (2503.14476), eq. 10.
        clip_dual: where the advantage is negative, the ratio counts up to this: 1912.09729, eq. 5.
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
    """CISPO: the ratio weighs the log-probability and has no gradient of its own.

    So a token past the bound still learns, with a bounded weight: MiniMax-M1 (2506.13585), eq. 4.

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
    """SAPO: a sigmoid gate around ratio 1 instead of a clip (2511.20347), eq. 5 and 6.

    Args:
        sharpness_positive, sharpness_negative: of the gate, by the sign of the advantage; the
            paper's temperatures.
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
    """VESPO: the weight w^k · e^(λ(1-w)) of a sequence's ratio w, without gradient (2602.10693).

    Args:
        power_*: k, how fast a ratio under 1 loses weight, by the sign of the advantage.
        decay_*: λ, how fast one over 1 does.
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
    """REINFORCE: -advantage · log policy, whatever the ratio. GPG (2504.02546), eq. 5."""
    return PolicyLoss(-advantages_N1 * logprobs_NC, torch.zeros_like(logprobs_NC, dtype=torch.bool))
