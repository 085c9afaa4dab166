"""Draws tokens from logits, with their log-probabilities, in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.models.sampling_filters import scale_and_filter
from grpo.types import Sampling

BLOCK_TOKENS = 128  # tokens of the vocabulary that are summed together


def sample_tokens(
    logits_NV: Tensor, sampling: Sampling, seen_NV: Tensor | None, uniform_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Draws a token for each row, and returns it [N] with its log-probability [N] as drawn.

    The token is the first at which the cumulative probability exceeds a uniform number, so a row's
    token depends only on that row's number and logits. NaN logits give an arbitrary token with a
    log-probability of NaN.

    Args:
        seen_NV: bool, the tokens that occurred before, for a repetition penalty; else None.
        uniform_N: in [0, 1).
    """
    logits_NV = scale_and_filter(logits_NV, sampling, seen_NV)
    probs_NV = torch.softmax(logits_NV, dim=-1)
    if sampling.temperature == 0:
        token_N1 = logits_NV.argmax(dim=-1, keepdim=True)
    else:
        token_N1 = find_token_at(uniform_N[:, None], probs_NV)
    return token_N1[:, 0], probs_NV.gather(1, token_N1)[:, 0].log()


def find_token_at(share_N1: Tensor, probs_NV: Tensor) -> Tensor:
    """Returns the first token [N, 1] at which the cumulative probability exceeds this share.

    It finds the token's block first and then the token within it: a sum over blocks is fast, while
    a cumulative sum over the vocabulary is not.
    """
    blocks_NKW = F.pad(probs_NV, (0, -probs_NV.shape[1] % BLOCK_TOKENS)).unflatten(
        1, (-1, BLOCK_TOKENS)
    )
    sums_NK = blocks_NKW.sum(dim=-1)
    passed_NK = sums_NK.cumsum(dim=-1)
    point_N1 = share_N1 * passed_NK[:, -1:]
    block_N1 = find_first_past(point_N1, passed_NK)
    before_N1 = passed_NK.gather(1, block_N1) - sums_NK.gather(1, block_N1)
    inside_NW = blocks_NKW[torch.arange(len(block_N1), device=block_N1.device), block_N1[:, 0]]
    token_N1 = block_N1 * BLOCK_TOKENS + find_first_past(
        point_N1 - before_N1, inside_NW.cumsum(dim=-1)
    )
    return token_N1.clamp(max=probs_NV.shape[1] - 1)  # NaN exceeds no point


def find_first_past(point_N1: Tensor, passed_NK: Tensor) -> Tensor:
    """Returns the first index [N, 1] whose sum exceeds the point; never one of probability 0."""
    total_N1 = passed_NK[:, -1:]
    below_N1 = torch.nextafter(total_N1, torch.zeros_like(total_N1))
    point_N1 = torch.minimum(point_N1.clamp(min=0.0), below_N1)
    place_N1 = torch.searchsorted(passed_NK, point_N1, right=True)
    return place_N1.clamp(max=passed_NK.shape[1] - 1)


def mark_prompt_tokens(
    prompts: list[tuple[int, ...]], vocabulary: int, group: int, device: torch.device
) -> Tensor:
    """Returns [N, V] bool: the tokens that each row's prompt contains."""
    seen_BV = torch.zeros(len(prompts), vocabulary, dtype=torch.bool)
    for b, tokens in enumerate(prompts):
        seen_BV[b, list(tokens)] = True
    return seen_BV.repeat_interleave(group, dim=0).to(device)
