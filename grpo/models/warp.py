"""From logits to the logits of the distribution that is sampled from: cut tokens are at -inf.

The order and the meaning of each step are those of transformers' `generate`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.types import Sampling


def warp(logits_TV: Tensor, sampling: Sampling, seen_TV: Tensor | None) -> Tensor:
    """[T, V] logits, penalised, divided and cut.

    seen_TV: bool, the tokens before each position, prompt and all; only a penalty needs it.
    """
    return cut(divide(logits_TV, sampling, seen_TV), sampling)


def divide(logits_TV: Tensor, sampling: Sampling, seen_TV: Tensor | None) -> Tensor:
    """The penalty, and the temperature."""
    if seen_TV is not None:
        penalty = sampling.repetition_penalty
        penalised_TV = torch.where(logits_TV < 0, logits_TV * penalty, logits_TV / penalty)
        logits_TV = torch.where(seen_TV, penalised_TV, logits_TV)
    return logits_TV if sampling.temperature in (0, 1) else logits_TV / sampling.temperature


def cut(logits_TV: Tensor, sampling: Sampling) -> Tensor:
    """Everything that sampling leaves out at -inf."""
    if sampling.top_k:
        logits_TV = keep_top_k(logits_TV, sampling.top_k)
    if sampling.top_p < 1:
        logits_TV = keep_top_p(logits_TV, sampling.top_p)
    if sampling.min_p > 0:
        logits_TV = keep_min_p(logits_TV, sampling.min_p)
    return logits_TV


def keep_top_k(logits_TV: Tensor, k: int) -> Tensor:
    """The k likeliest tokens."""
    least_T1 = logits_TV.topk(min(k, logits_TV.shape[-1]), dim=-1).values[:, -1:]
    return logits_TV.masked_fill(logits_TV < least_T1, -torch.inf)


def keep_top_p(logits_TV: Tensor, p: float) -> Tensor:
    """The likeliest tokens up to the first with which they make up p: nucleus (1904.09751)."""
    sorted_TV, order_TV = logits_TV.sort(dim=-1, descending=True)
    before_TV = sorted_TV.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
    before_TV[:, 0] = 0.0
    cut_TV = torch.zeros_like(before_TV, dtype=torch.bool).scatter(-1, order_TV, before_TV >= p)
    return logits_TV.masked_fill(cut_TV, -torch.inf)


def keep_min_p(logits_TV: Tensor, p: float) -> Tensor:
    """The tokens at least p times as likely as the likeliest (2407.01082)."""
    least_T1 = logits_TV.amax(dim=-1, keepdim=True) + torch.tensor(p).log()
    return logits_TV.masked_fill(logits_TV < least_T1, -torch.inf)
