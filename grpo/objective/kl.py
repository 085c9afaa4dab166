"""KL divergences between the policy and the reference, for each token.

Notation: x is drawn from the policy, and r = reference(x) / policy(x). KL(policy ‖ reference),
called reverse, is the mean of -log r; KL(reference ‖ policy), called forward, is the mean of
r log r. The numbers in the names are those of J. Schulman, "Approximating KL Divergence" (2020).
All estimators take two tensors of one shape and return a tensor of that shape.

The gradient of their average as a loss, over samples whose weights have no gradient: k1's is zero
in expectation (E[∇ log policy] = 0), k2's is that of the reverse divergence, and k3's is that of
the forward one. Weighted by the ratio (`kl.unbiased_gradient`), each unbiased estimator has the
gradient of the divergence that it estimates: docs/kl.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Both take log-probabilities of the policy and of the reference.
Estimator = Callable[[Tensor, Tensor], Tensor]  # of the sampled tokens
Divergence = Callable[[Tensor, Tensor], Tensor]  # of the whole vocabulary, [..., V] -> [...]


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Returns -log r: unbiased, often negative."""
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Returns (log r)² / 2: biased, never negative; equal to second order in both directions."""
    return 0.5 * (reference_logprobs - logprobs).square()


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Returns r - 1 - log r: unbiased, never negative. DeepSeekMath (2402.03300), eq. 4."""
    log_r = reference_logprobs - logprobs
    return torch.expm1(log_r) - log_r


def forward_k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Returns r log r: unbiased for KL(reference ‖ policy)."""
    log_r = reference_logprobs - logprobs
    return log_r.exp() * log_r


def forward_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Returns r log r - (r - 1): unbiased for KL(reference ‖ policy), never negative."""
    log_r = reference_logprobs - logprobs
    return log_r.exp() * log_r - torch.expm1(log_r)


def full(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Returns the exact KL(policy ‖ reference), summed over the vocabulary: [..., V] -> [...]."""
    return (logprobs.exp() * (logprobs - reference_logprobs)).sum(dim=-1)


def forward_full(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Returns the exact KL(reference ‖ policy), summed over the vocabulary: [..., V] -> [...]."""
    return full(reference_logprobs, logprobs)


ESTIMATORS: dict[str, dict[str, Estimator]] = {
    "reverse": {"k1": k1, "k2": k2, "k3": k3},
    "forward": {"k1": forward_k1, "k2": k2, "k3": forward_k3},
}
DIVERGENCES: dict[str, Divergence] = {"reverse": full, "forward": forward_full}


class AdaptiveWeight:
    """Adapts kl_weight to keep the divergence near a target: Ziegler et al. (1909.08593), eq. 3."""

    def __init__(self, weight: float, target: float | None, horizon: int) -> None:
        """
        Args:
            target: for kl/mean, in nats a token; None keeps the weight constant.
            horizon: the number of completions after which the weight has changed by a fifth, if the
                divergence is at least a fifth away from the target.
        """
        self.weight, self.target, self.horizon = weight, target, horizon

    def observe(self, divergence: float, completions: int) -> None:
        """Adapts the weight to the mean divergence of a step with so many completions."""
        if self.target is None or not math.isfinite(divergence):
            return
        error = min(max(divergence / self.target - 1, -0.2), 0.2)
        self.weight *= 1 + error * completions / self.horizon
