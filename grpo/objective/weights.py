"""Weights that average the tokens' losses into one, computed once for a whole step.

The loss is a plain weighted sum, so micro-batches, accumulation and ranks add up exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """The completion tokens of a step, over which the loss is averaged."""

    mask_NC: Tensor  # bool, true on the tokens that are trained on
    minibatch_N: Tensor  # int64, the index of each completion's minibatch within the step
    max_tokens: int  # max_new_tokens, the limit of a completion's length


Averaging = Callable[[Tokens], Tensor]  # returns weights [N, C], float32


def sequence_mean(tokens: Tokens) -> Tensor:
    """Weights each completion by 1/N, and each of its tokens by 1/length.

    DeepSeekMath (2402.03300), eq. 3: the mean over the group of the mean over the tokens.
    """
    lengths_N1 = tokens.mask_NC.sum(dim=1, keepdim=True).clamp(min=1)
    return tokens.mask_NC / (lengths_N1 * tokens.mask_NC.shape[0])


def token_mean(tokens: Tokens) -> Tensor:
    """Gives all tokens of the step the same weight: DAPO (2503.14476), eq. 8."""
    return tokens.mask_NC / tokens.mask_NC.sum().clamp(min=1)


def minibatch_token_mean(tokens: Tokens) -> Tensor:
    """Gives all minibatches the same weight, and all tokens within one: TRL's `bnpo`."""
    tokens_M = torch.bincount(tokens.minibatch_N, weights=tokens.mask_NC.sum(dim=1).float())
    count = int(tokens.minibatch_N.max()) + 1
    divisor_N1 = tokens_M.clamp(min=1)[tokens.minibatch_N][:, None] * count
    return tokens.mask_NC / divisor_N1


def constant(tokens: Tokens) -> Tensor:
    """Weights each token by 1 / (N · max_tokens): Dr. GRPO (2503.20783), section 3.2."""
    return tokens.mask_NC / float(tokens.mask_NC.shape[0] * tokens.max_tokens)


def sequence_sum(tokens: Tokens) -> Tensor:
    """Weights each token by 1/N, so long completions count more, as in LUSPO (2602.05261)."""
    return tokens.mask_NC / float(tokens.mask_NC.shape[0])


AVERAGINGS: dict[str, Averaging] = {
    "sequence_mean": sequence_mean,
    "token_mean": token_mean,
    "minibatch_token_mean": minibatch_token_mean,
    "constant": constant,
    "sequence_sum": sequence_sum,
}


def top_entropy_mask(entropy_NC: Tensor, mask_NC: Tensor, share: float) -> Tensor:
    """Returns [N, C] bool: the `share` of all tokens with the highest entropy (2506.01939).

    These are the tokens at which a chain of reasoning branches.
    """
    if share >= 1:
        return mask_NC
    # Computes torch.quantile, which itself takes at most 16 million values.
    sorted_T = entropy_NC[mask_NC].sort().values
    place = (1 - share) * (len(sorted_T) - 1)
    below, above = sorted_T[int(place)], sorted_T[min(int(place) + 1, len(sorted_T) - 1)]
    return mask_NC & (entropy_NC >= torch.lerp(below, above, place % 1))
