"""What a token counts if another policy has sampled it: importance weights, and what is left out.

The sampler is the policy as another engine, another precision or an earlier step computes it. The
weights correct the expectation; bounds keep their variance finite, at the price of a bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.objective.ratios import Ratio, token_ratio


@dataclass(frozen=True)
class OffPolicyCorrection:
    """How a token's policy loss is weighted by old policy / sampler.

    With the defaults these are truncated importance weights (IMPALA, 1802.01561). `token_ratio` and
    `outside="mask"` are IcePop's (2510.18855); `sequence_product` is the exact weight of a
    completion; TRL's four modes and verl's are the combinations of level and `outside`.
    """

    level: Ratio = token_ratio  # of a token, or of a whole completion
    low: float = 0.0
    high: float = 2.0
    outside: str = "truncate"  # a weight beyond a bound becomes the bound; mask: it becomes zero
    max_sequence_kl: float | None = None  # None: no completion is left out

    def weigh(self, old_NC: Tensor, sampler_NC: Tensor, mask_NC: Tensor) -> Tensor:
        """Returns the weights, [N, C] or [N, 1], from log-probabilities of the sampled tokens."""
        weights = self.level(old_NC, sampler_NC, mask_NC)
        if self.outside == "truncate":
            return weights.clamp(self.low, self.high)
        return weights * ((weights >= self.low) & (weights <= self.high))

    def keep(
        self, logprobs_NC: Tensor, sampler_NC: Tensor, mask_NC: Tensor, advantages_N1: Tensor
    ) -> Tensor:
        """Returns bool [N, 1]: which completions are trained on.

        One with a negative advantage is left out if its tokens are less likely now than when they
        were sampled by more than `max_sequence_kl` nats on average: DeepSeek-V3.2 (2512.02556).
        """
        if self.max_sequence_kl is None:
            return torch.ones_like(advantages_N1, dtype=torch.bool)
        lost_NC = (sampler_NC - logprobs_NC.detach()).masked_fill(~mask_NC, 0.0)
        lengths_N1 = mask_NC.sum(dim=1, keepdim=True).clamp(min=1)
        return (advantages_N1 >= 0) | (
            lost_NC.sum(dim=1, keepdim=True) / lengths_N1 <= self.max_sequence_kl
        )


def effective_share(log_weights_T: Tensor) -> float:
    """Returns the effective sample size over the number of samples, in (0, 1]: Kong (1992).

    1 means that all weights are equal; 0.5, that the variance is that of half as many samples.
    """
    weights = (log_weights_T - log_weights_T.max()).exp()
    return float(weights.mean() ** 2 / weights.square().mean())


def chi_squared(log_weights_T: Tensor) -> float:
    """Returns the estimate of the chi-squared divergence of policy from sampler: E[w²] - 1."""
    return float((2 * log_weights_T).exp().mean() - 1)
