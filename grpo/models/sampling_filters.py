"""From logits to the logits of the distribution that is sampled from: cut tokens are at -inf.

The order and the meaning of each step are those of transformers' `generate`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.types import Sampling


def scale_and_filter(logits_TV: Tensor, sampling: Sampling, seen_TV: Tensor | None) -> Tensor:
    """[T, V] logits, penalised, divided and cut.

    seen_TV: bool, the tokens before each position, prompt and all; only a penalty needs it.
    """
    return filter_logits(scale_logits(logits_TV, sampling, seen_TV), sampling)


def scale_logits(logits_TV: Tensor, sampling: Sampling, seen_TV: Tensor | None) -> Tensor:
    """The penalty, and the temperature."""
    if seen_TV is not None:
        penalty = sampling.repetition_penalty
        penalised_TV = torch.where(logits_TV < 0, logits_TV * penalty, logits_TV / penalty)
        logits_TV = torch.where(seen_TV, penalised_TV, logits_TV)
    return logits_TV if sampling.temperature in (0, 1) else logits_TV / sampling.temperature


def filter_logits(logits_TV: Tensor, sampling: Sampling) -> Tensor:
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


@dataclass
class KeptTokens:
    """Which tokens were left at each place [N, C] of a rollout, as lists of ids end to end.

    An importance weight is of two policies over the same tokens: what the old one left is what the
    new one may choose from, wherever its own top-p would be by now.
    """

    starts_NC: Tensor  # int64, where in ids a place's list begins
    counts_NC: Tensor  # int64
    ids: list[Tensor]  # int32

    @classmethod
    def create_empty(cls, lengths_N: Tensor, width: int) -> KeptTokens:
        """Nothing yet, for rows of a rollout."""
        starts_NC = torch.zeros(len(lengths_N), width, dtype=torch.int64, device=lengths_N.device)
        return cls(starts_NC, starts_NC.clone(), [])

    def filter_logits(
        self, rows_T: Tensor, columns_T: Tensor, logits_TV: Tensor, sampling: Sampling
    ) -> Tensor:
        """As `filter_logits`, but that a place keeps what it kept when it was asked for first."""
        if bool(self.counts_NC[rows_T, columns_T].all()):
            kept_TV = self._look_up(rows_T, columns_T, logits_TV.shape[1])
            return logits_TV.masked_fill(~kept_TV, -torch.inf)
        cut_TV = filter_logits(logits_TV, sampling)
        self._store(rows_T, columns_T, cut_TV > -torch.inf)
        return cut_TV

    def _store(self, rows_T: Tensor, columns_T: Tensor, kept_TV: Tensor) -> None:
        place, token = kept_TV.nonzero(as_tuple=True)
        counts_T = torch.bincount(place, minlength=len(kept_TV))
        before = sum(len(ids) for ids in self.ids)
        self.starts_NC[rows_T, columns_T] = before + counts_T.cumsum(0) - counts_T
        self.counts_NC[rows_T, columns_T] = counts_T
        self.ids.append(token.int())

    def _look_up(self, rows_T: Tensor, columns_T: Tensor, vocabulary: int) -> Tensor:
        """[T, V] bool"""
        if len(self.ids) > 1:
            self.ids = [torch.cat(self.ids)]
        starts_T, counts_T = self.starts_NC[rows_T, columns_T], self.counts_NC[rows_T, columns_T]
        kept_TV = torch.zeros(len(rows_T), vocabulary, dtype=torch.bool, device=rows_T.device)
        place = torch.arange(len(rows_T), device=rows_T.device).repeat_interleave(counts_T)
        within = torch.arange(len(place), device=rows_T.device)
        within += (starts_T - (counts_T.cumsum(0) - counts_T))[place]
        kept_TV[place, self.ids[0][within].long()] = True
        return kept_TV
