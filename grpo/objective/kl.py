"""KL divergences between the policy and the reference, by token.

With x drawn from the policy and r = reference(x) / policy(x). J. Schulman, "Approximating KL
Divergence" (2020). KL(policy ‖ reference), called reverse, is the mean of -log r; KL(reference ‖
policy), called forward, that of r log r. All take log-probabilities of any one shape and give the
same shape; a name's number is Schulman's.

As a loss, averaged over samples whose weights have no gradient: k1 has no gradient at all in
expectation (E[∇ log policy] = 0), k2 has that of the reverse divergence, k3 that of the forward
one. Weighed by the ratio (`kl.unbiased_gradient`) each unbiased one has its own: docs/kl.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Estimator = Callable[[Tensor, Tensor], Tensor]  # log-probabilities, the reference's
Divergence = Callable[[Tensor, Tensor], Tensor]  # whole distributions [..., V] -> [...]


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """-log r: unbiased, often negative."""
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """(log r)² / 2: biased, never negative; the same to second order in either direction."""
    return 0.5 * (reference_logprobs - logprobs).square()


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """r - 1 - log r: unbiased, never negative. DeepSeekMath (2402.03300), eq. 4."""
    log_r = reference_logprobs - logprobs
    return torch.expm1(log_r) - log_r


def forward_k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """r log r: unbiased for KL(reference ‖ policy)."""
    log_r = reference_logprobs - logprobs
    return log_r.exp() * log_r


def forward_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """r log r - (r - 1): unbiased for KL(reference ‖ policy), never negative."""
    log_r = reference_logprobs - logprobs
    return log_r.exp() * log_r - torch.expm1(log_r)


def full(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """KL(policy ‖ reference) itself, a sum over the vocabulary: [..., V] in, [...] out."""
    return (logprobs.exp() * (logprobs - reference_logprobs)).sum(dim=-1)


def forward_full(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """KL(reference ‖ policy) itself, a sum over the vocabulary: [..., V] in, [...] out."""
    return full(reference_logprobs, logprobs)


ESTIMATORS: dict[str, dict[str, Estimator]] = {
    "reverse": {"k1": k1, "k2": k2, "k3": k3},
    "forward": {"k1": forward_k1, "k2": k2, "k3": forward_k3},
}
DIVERGENCES: dict[str, Divergence] = {"reverse": full, "forward": forward_full}


class AdaptiveWeight:
    """kl_weight, moved so that the divergence stays near a target: Ziegler (1909.08593), eq. 3."""

    def __init__(self, weight: float, target: float | None, horizon: int) -> None:
        """target: of kl/mean, nats a token; None keeps the weight. horizon: completions after
        which the weight has changed by a fifth, where the divergence is far from the target."""
        self.weight, self.target, self.horizon = weight, target, horizon

    def observe(self, divergence: float, completions: int) -> None:
        """Moves the weight after a step whose mean divergence this was."""
        if self.target is None or not math.isfinite(divergence):
            return
        error = min(max(divergence / self.target - 1, -0.2), 0.2)
        self.weight *= 1 + error * completions / self.horizon
