"""From logits to a token and its log-probability, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.models.warp import warp
from grpo.types import Sampling


def draw(
    logits_NV: Tensor, sampling: Sampling, seen_NV: Tensor | None, uniform_N: Tensor
) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability under the distribution that it is drawn from.

    A token is where the cumulated probabilities pass a uniform number, so what a row draws depends
    on its own number alone, and not on which rows are drawn beside it.

    Args:
        seen_NV: bool, the tokens before, for a penalty.
        uniform_N: in [0, 1).
    """
    logits_NV = warp(logits_NV, sampling, seen_NV)
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
    if sampling.temperature == 0:
        token_N1 = logprobs_NV.argmax(dim=-1, keepdim=True)
    else:
        passed_NV = logprobs_NV.exp().cumsum(dim=-1)
        total_N1 = passed_NV[:, -1:]
        # Rounded up it could reach the total, and stand behind the last token there is.
        below_N1 = torch.nextafter(total_N1, torch.zeros_like(total_N1))
        point_N1 = torch.minimum(uniform_N[:, None] * total_N1, below_N1)
        token_N1 = torch.searchsorted(passed_NV, point_N1, right=True)
    return token_N1[:, 0], logprobs_NV.gather(1, token_N1)[:, 0]


def seen_tokens(
    prompts: list[tuple[int, ...]], vocabulary: int, group: int, device: torch.device
) -> Tensor:
    """[N, V] bool: the tokens of each row's prompt."""
    seen_BV = torch.zeros(len(prompts), vocabulary, dtype=torch.bool)
    for b, tokens in enumerate(prompts):
        seen_BV[b, list(tokens)] = True
    return seen_BV.repeat_interleave(group, dim=0).to(device)
