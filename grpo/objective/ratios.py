"""Importance ratios π / π_old: how much likelier a sampled token is now than when it was sampled.

All take the policy's log-probabilities [N, C], the sampler's, and a mask of the completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # bound of a sequence's summed log-ratio: e^20 is finite, and above every clip

Ratio = Callable[[Tensor, Tensor, Tensor], Tensor]  # log-probabilities, the sampler's, mask


def token_ratio(logprobs_NC: Tensor, old_logprobs_NC: Tensor, mask_NC: Tensor) -> Tensor:
    """Returns each token's ratio [N, C]: PPO (1707.06347), DeepSeekMath (2402.03300), eq. 3."""
    return torch.exp(logprobs_NC - old_logprobs_NC)


def sequence_ratio(logprobs_NC: Tensor, old_logprobs_NC: Tensor, mask_NC: Tensor) -> Tensor:
    """Returns the geometric mean [N, 1] over a completion's tokens: GSPO (2507.18071), eq. 7."""
    log_ratio_NC = (logprobs_NC - old_logprobs_NC).masked_fill(~mask_NC, 0.0)
    lengths_N1 = mask_NC.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.exp(log_ratio_NC.sum(dim=1, keepdim=True) / lengths_N1)


def sequence_product(logprobs_NC: Tensor, old_logprobs_NC: Tensor, mask_NC: Tensor) -> Tensor:
    """Returns the product [N, 1] over a completion's tokens: the exact importance weight (RLOO)."""
    log_ratio_NC = (logprobs_NC - old_logprobs_NC).masked_fill(~mask_NC, 0.0)
    return torch.exp(log_ratio_NC.sum(dim=1, keepdim=True).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


RATIOS: dict[str, Ratio] = {
    "token": token_ratio,
    "sequence": sequence_ratio,
    "sequence_product": sequence_product,
}
