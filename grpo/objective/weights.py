"""How tokens are averaged into one loss: weights, made once for a whole step.

A loss is then a plain weighted sum, so micro-batches, accumulation and ranks add up exactly.
"""

from __future__ import annotations

from torch import Tensor


def sequence_mean(mask_NC: Tensor) -> Tensor:
    """Each completion counts the same: 1/N for each, 1/length for each of its tokens.

    DeepSeekMath (2402.03300), eq. 3: the mean over the group of the mean over the tokens.

    Args:
        mask_NC: [N, C] bool, true on completion tokens.

    Returns:
        [N, C] float32 that sums to 1, zero on padding.
    """
    lengths_N1 = mask_NC.sum(dim=1, keepdim=True).clamp(min=1)
    return mask_NC / (lengths_N1 * mask_NC.shape[0])
