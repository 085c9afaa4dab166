"""Estimators of KL(policy ‖ reference) from the log-probabilities of the sampled tokens.

With x drawn from the policy and r = reference(x) / policy(x), per token. J. Schulman,
"Approximating KL Divergence" (2020). k1 and k3 are unbiased, k2 is not; k2 and k3 are never
negative. As a loss, k2 has the gradient of the KL; k3 that of the KL the other way round, to first
order; k1 has none in expectation, since E[∇ log policy] = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """-log r. Any one shape in, the same out."""
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """(log r)² / 2. Any one shape in, the same out."""
    return 0.5 * (reference_logprobs - logprobs).square()


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """r - 1 - log r: DeepSeekMath (2402.03300), eq. 4. Any one shape in, the same out."""
    log_r = reference_logprobs - logprobs
    return torch.expm1(log_r) - log_r
