"""How tokens are averaged into one loss: weights, made once for a whole step.

A loss is then a plain weighted sum, so micro-batches, accumulation and ranks add up exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """The completion tokens of a step: what there is to average over."""

    mask_NC: Tensor  # bool, true on the tokens that are trained on
    minibatch_N: Tensor  # int64, in which of the step's minibatches each completion is
    max_tokens: int  # the longest that a completion may be


Averaging = Callable[[Tokens], Tensor]  # -> weights [N, C] float32


def sequence_mean(tokens: Tokens) -> Tensor:
    """Each completion counts the same: 1/N for each, 1/length for each of its tokens.

    DeepSeekMath (2402.03300), eq. 3: the mean over the group of the mean over the tokens.
    """
    lengths_N1 = tokens.mask_NC.sum(dim=1, keepdim=True).clamp(min=1)
    return tokens.mask_NC / (lengths_N1 * tokens.mask_NC.shape[0])


def token_mean(tokens: Tokens) -> Tensor:
    """Each token of the whole step counts the same: DAPO (2503.14476), eq. 8."""
    return tokens.mask_NC / tokens.mask_NC.sum().clamp(min=1)


def minibatch_token_mean(tokens: Tokens) -> Tensor:
    """Each token of a minibatch counts the same, and each minibatch: TRL's `bnpo`."""
    own_N = torch.bincount(tokens.minibatch_N, weights=tokens.mask_NC.sum(dim=1).float())
    count = int(tokens.minibatch_N.max()) + 1
    share_N1 = own_N.clamp(min=1)[tokens.minibatch_N][:, None] * count
    return tokens.mask_NC / share_N1


def constant(tokens: Tokens) -> Tensor:
    """1 / (N · the longest that one may be) for each token: Dr. GRPO (2503.20783), section 3.2."""
    return tokens.mask_NC / float(tokens.mask_NC.shape[0] * tokens.max_tokens)


def sequence_sum(tokens: Tokens) -> Tensor:
    """1/N for each token, so long completions count more, as in LUSPO (2602.05261)."""
    return tokens.mask_NC / float(tokens.mask_NC.shape[0])


AVERAGINGS: dict[str, Averaging] = {
    "sequence_mean": sequence_mean,
    "token_mean": token_mean,
    "minibatch_token_mean": minibatch_token_mean,
    "constant": constant,
    "sequence_sum": sequence_sum,
}


def top_entropy_mask(entropy_NC: Tensor, mask_NC: Tensor, share: float) -> Tensor:
    """[N, C] bool: the `share` of all tokens where the policy was least sure (2506.01939).

    What forks a chain of reasoning is there; the rest follows from it.
    """
    if share >= 1:
        return mask_NC
    # torch.quantile, which takes no more than 16 million values.
    sorted_T = entropy_NC[mask_NC].sort().values
    place = (1 - share) * (len(sorted_T) - 1)
    below, above = sorted_T[int(place)], sorted_T[min(int(place) + 1, len(sorted_T) - 1)]
    return mask_NC & (entropy_NC >= torch.lerp(below, above, place % 1))
