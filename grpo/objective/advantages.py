"""Advantages: how much better a completion's reward is than that of others.

advantage = (reward - baseline) / scale; any baseline can be combined with any scale. NaN is a
reward that doesn't apply or could not be computed: it is left out of all means and deviations, and
its advantage is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-4  # added to a deviation before dividing by it, as in TRL and verl

# rewards [B, G] -> the tensor to subtract or to divide by, [B, G] or broadcastable to it
Baseline = Callable[[Tensor], Tensor]
Scale = Callable[[Tensor], Tensor]


def group_mean(rewards_BG: Tensor) -> Tensor:
    """Returns the mean of each completion's group: DeepSeekMath (2402.03300), section 4.1.2.

    If all rewards of a group are equal, it returns them as they are, so that the rounding of a mean
    doesn't become an advantage.
    """
    mean_B1 = rewards_BG.nanmean(dim=1, keepdim=True)
    return torch.where(has_equal_rewards(rewards_BG), rewards_BG, mean_B1)


def leave_one_out(rewards_BG: Tensor) -> Tensor:
    """Returns the mean of the others in the group: RLOO (2402.14740), eq. 6. NaN without others."""
    count_B1 = rewards_BG.isfinite().sum(dim=1, keepdim=True)
    others_BG = (rewards_BG.nansum(dim=1, keepdim=True) - rewards_BG) / (count_B1 - 1)
    return torch.where(has_equal_rewards(rewards_BG) & (count_B1 > 1), rewards_BG, others_BG)


def batch_mean(rewards_BG: Tensor) -> Tensor:
    """Returns the mean of all rewards of the step: REINFORCE++ (2501.03262), eq. 9."""
    return torch.where(
        has_equal_rewards(rewards_BG.reshape(1, -1)), rewards_BG, rewards_BG.nanmean()
    )


def no_baseline(rewards_BG: Tensor) -> Tensor:
    """Returns zeros: plain REINFORCE."""
    return torch.zeros_like(rewards_BG)


def group_std(rewards_BG: Tensor) -> Tensor:
    """Returns the sample standard deviation of each group [B, 1], with G-1 in the denominator."""
    return nanstd(rewards_BG) + EPSILON


def batch_std(rewards_BG: Tensor) -> Tensor:
    """Returns the standard deviation of all rewards of the step: 2508.08221, section 4.2."""
    return nanstd(rewards_BG.reshape(1, -1)) + EPSILON


def informative_share(rewards_BG: Tensor) -> Tensor:
    """Returns the share of groups whose rewards differ: 1 / alpha in GPG (2504.02546), eq. 7."""
    informative_B1 = ~has_equal_rewards(rewards_BG)
    return informative_B1.to(rewards_BG.dtype).mean().clamp(min=1 / len(rewards_BG))


def no_scale(rewards_BG: Tensor) -> Tensor:
    """Returns ones: Dr. GRPO (2503.20783), which avoids weighting questions by difficulty."""
    return torch.ones_like(rewards_BG)


BASELINES: dict[str, Baseline] = {
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
    "batch_mean": batch_mean,
    "none": no_baseline,
}
SCALES: dict[str, Scale] = {
    "group_std": group_std,
    "batch_std": batch_std,
    "informative_share": informative_share,
    "none": no_scale,
}


class Normalize(NamedTuple):
    """Computes (rewards - baseline) / scale from rewards [B, G]; NaN where a reward is NaN."""

    baseline: Baseline
    scale: Scale

    def __call__(self, rewards_BG: Tensor) -> Tensor:
        return (rewards_BG - self.baseline(rewards_BG)) / self.scale(rewards_BG)


def sum_then_normalize(
    parts_RBG: Tensor, weights_R: Tensor, normalize: Normalize, penalty_BG: Tensor | None = None
) -> Tensor:
    """Returns advantages [B, G] from the weighted sum of the rewards.

    Args:
        penalty_BG: weight x divergence, if the KL is part of the reward: subtracted from the sum
            first, as in RLOO (2402.14740), eq. 3.
    """
    total_BG = weighted_sum(parts_RBG, weights_R)
    if penalty_BG is not None:
        total_BG = total_BG - penalty_BG
    return normalize(total_BG).nan_to_num(nan=0.0)


def normalize_then_sum(
    parts_RBG: Tensor, weights_R: Tensor, normalize: Normalize, penalty_BG: Tensor | None = None
) -> Tensor:
    """Returns advantages [B, G]: normalizes each reward, then their weighted sum over the step.

    So rewards with a small spread count as much as those with a large one: GDPO (2601.05242).

    Args:
        penalty_BG: weight x divergence, if the KL is part of the reward. GDPO has it in the loss;
            normalized as one more reward, its effect would not depend on its size. So its baseline
            is subtracted, it is not divided by a scale, and it is then subtracted from the
            advantages, whose deviation is 1: a completion whose divergence is 1 nat above its
            baseline loses kl_weight deviations.
    """
    each_RBG = torch.stack([normalize(part_BG) for part_BG in parts_RBG])
    total_BG = weighted_sum(each_RBG, weights_R)
    advantages_BG = Normalize(batch_mean, batch_std)(total_BG)
    if penalty_BG is not None:
        penalty_BG = penalty_BG.masked_fill(total_BG.isnan(), torch.nan)
        advantages_BG = advantages_BG - (penalty_BG - normalize.baseline(penalty_BG))
    return advantages_BG.nan_to_num(nan=0.0)


AGGREGATES: dict[str, Callable[..., Tensor]] = {
    "sum_then_normalize": sum_then_normalize,
    "normalize_then_sum": normalize_then_sum,
}


def weighted_sum(parts_RBG: Tensor, weights_R: Tensor) -> Tensor:
    """Returns the weighted sum [B, G]. NaN parts add nothing; the sum of only NaN parts is NaN."""
    total_BG = (parts_RBG * weights_R.view(-1, 1, 1)).nansum(dim=0)
    return total_BG.masked_fill(parts_RBG.isnan().all(dim=0), torch.nan)


def has_equal_rewards(rewards_BG: Tensor) -> Tensor:
    """Returns [B, 1] bool: whether all rewards of a group that are not NaN are the same."""
    highest_B1 = rewards_BG.nan_to_num(nan=-torch.inf).amax(dim=1, keepdim=True)
    lowest_B1 = rewards_BG.nan_to_num(nan=torch.inf).amin(dim=1, keepdim=True)
    return highest_B1 <= lowest_B1


def nanstd(rewards_BG: Tensor) -> Tensor:
    """Returns the standard deviation [B, 1] of each row's finite values; 0 if it has only one."""
    count_B1 = rewards_BG.isfinite().sum(dim=1, keepdim=True)
    centred_BG = rewards_BG - rewards_BG.nanmean(dim=1, keepdim=True)
    variance_B1 = centred_BG.square().nansum(dim=1, keepdim=True) / (count_B1 - 1).clamp(min=1)
    return variance_B1.sqrt()
