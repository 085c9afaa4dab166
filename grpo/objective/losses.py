"""Policy losses, one value a token. What averages them is in `weights`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PolicyLoss(NamedTuple):
    """A policy loss by token."""

    loss_NC: Tensor
    clipped_NC: Tensor  # bool: the clip took this token's gradient away


def clipped_surrogate(
    logprobs_NC: Tensor,
    old_logprobs_NC: Tensor,
    advantages_N: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> PolicyLoss:
    """PPO's clipped surrogate, negated: PPO (1707.06347), eq. 7; DeepSeekMath (2402.03300), eq. 3.

    On-policy the ratio is 1 and the value -advantage, but its gradient is that of the policy's
    log-probability: -advantage · ∇ log policy.

    Args:
        logprobs_NC: [N, C] of the policy being trained, with gradient.
        old_logprobs_NC: [N, C] of the policy that sampled, without.
        advantages_N: [N].
        clip_low, clip_high: the ratio counts between 1 - clip_low and 1 + clip_high.

    Returns:
        [N, C] loss of each token, and which tokens the clip holds back.
    """
    ratio_NC = torch.exp(logprobs_NC - old_logprobs_NC)
    clipped_NC = ratio_NC.clamp(1 - clip_low, 1 + clip_high)
    advantages_N1 = advantages_N[:, None]
    surrogate_NC, clipped_surrogate_NC = ratio_NC * advantages_N1, clipped_NC * advantages_N1
    return PolicyLoss(
        -torch.minimum(surrogate_NC, clipped_surrogate_NC), clipped_surrogate_NC < surrogate_NC
    )
