"""Advantages: what a completion's reward says about it, next to its group's."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards_BG: Tensor, epsilon: float = 1e-4) -> Tensor:
    """How much better than its own group each completion did, in group standard deviations.

    A group that agrees teaches nothing: its row is zero. DeepSeekMath (2402.03300), section 4.1.2.

    Args:
        rewards_BG: [B, G] float, G >= 2.
        epsilon: added to the standard deviation (of the sample, G-1 in the denominator).

    Returns:
        [B, G] advantages, each row's mean zero.
    """
    centred_BG = rewards_BG - rewards_BG.mean(dim=1, keepdim=True)
    std_B1 = rewards_BG.std(dim=1, keepdim=True)
    agrees_B1 = (rewards_BG == rewards_BG[:, :1]).all(dim=1, keepdim=True)
    return torch.where(agrees_B1, 0.0, centred_BG / (std_B1 + epsilon))
