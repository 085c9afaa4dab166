"""Turns logits into those of the distribution that is sampled from: dropped tokens get -inf.

The steps and their order are those of transformers' `generate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.types import Sampling


def scale_and_filter(logits_TV: Tensor, sampling: Sampling, seen_TV: Tensor | None) -> Tensor:
    """Returns logits [T, V] after repetition penalty, temperature and filters.

    Args:
        seen_TV: bool, the tokens before each position, the prompt's too; None without a penalty.
    """
    return filter_logits(scale_logits(logits_TV, sampling, seen_TV), sampling)


def scale_logits(logits_TV: Tensor, sampling: Sampling, seen_TV: Tensor | None) -> Tensor:
    """Applies the repetition penalty and the temperature."""
    if seen_TV is not None:
        penalty = sampling.repetition_penalty
        penalised_TV = torch.where(logits_TV < 0, logits_TV * penalty, logits_TV / penalty)
        logits_TV = torch.where(seen_TV, penalised_TV, logits_TV)
    return logits_TV if sampling.temperature in (0, 1) else logits_TV / sampling.temperature


def filter_logits(logits_TV: Tensor, sampling: Sampling) -> Tensor:
    """Sets the logits of tokens that top-k, top-p or min-p drops to -inf."""
    if sampling.top_k:
        logits_TV = keep_top_k(logits_TV, sampling.top_k)
    if sampling.top_p < 1:
        logits_TV = keep_top_p(logits_TV, sampling.top_p)
    if sampling.min_p > 0:
        logits_TV = keep_min_p(logits_TV, sampling.min_p)
    return logits_TV


def keep_top_k(logits_TV: Tensor, k: int) -> Tensor:
    """Keeps the k likeliest tokens."""
    least_T1 = logits_TV.topk(min(k, logits_TV.shape[-1]), dim=-1).values[:, -1:]
    return logits_TV.masked_fill(logits_TV < least_T1, -torch.inf)


def keep_top_p(logits_TV: Tensor, p: float) -> Tensor:
    """Keeps the fewest likeliest tokens with a total probability of at least p (1904.09751)."""
    sorted_TV, order_TV = logits_TV.sort(dim=-1, descending=True)
    before_TV = sorted_TV.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
    before_TV[:, 0] = 0.0
    cut_TV = torch.zeros_like(before_TV, dtype=torch.bool).scatter(-1, order_TV, before_TV >= p)
    return logits_TV.masked_fill(cut_TV, -torch.inf)


def keep_min_p(logits_TV: Tensor, p: float) -> Tensor:
    """Keeps the tokens that are at least p times as likely as the likeliest (2407.01082)."""
    least_T1 = logits_TV.amax(dim=-1, keepdim=True) + torch.tensor(p).log()
    return logits_TV.masked_fill(logits_TV < least_T1, -torch.inf)


@dataclass
class KeptTokens:
    """The tokens that filters kept at each place [N, C] of a rollout, as lists of ids end to end.

    An importance weight compares two policies over the same tokens, so the new policy is scored
    over the tokens that the old one's filters kept, even if its own filters would keep others.
    """

    starts_NC: Tensor  # int64, where in ids the list of a place begins
    counts_NC: Tensor  # int64, the length of the list; 0: nothing stored yet
    ids: list[Tensor]  # int32, to be concatenated

    @classmethod
    def create_empty(cls, lengths_N: Tensor, width: int) -> KeptTokens:
        """Makes empty lists for a rollout with rows of these lengths, at most `width` tokens."""
        starts_NC = torch.zeros(len(lengths_N), width, dtype=torch.int64, device=lengths_N.device)
        return cls(starts_NC, starts_NC.clone(), [])

    def filter_logits(
        self, rows_T: Tensor, columns_T: Tensor, logits_TV: Tensor, sampling: Sampling
    ) -> Tensor:
        """Filters logits [T, V] at these places, with the tokens that their first call kept.

        The first call filters by `sampling` and stores the kept tokens.
        """
        if bool(self.counts_NC[rows_T, columns_T].all()):
            kept_TV = self._look_up(rows_T, columns_T, logits_TV.shape[1])
            return logits_TV.masked_fill(~kept_TV, -torch.inf)
        filtered_TV = filter_logits(logits_TV, sampling)
        self._store(rows_T, columns_T, filtered_TV > -torch.inf)
        return filtered_TV

    def join(self, parts: Sequence[KeptTokens]) -> None:
        """Takes the lists of several, each of which has other rows; may be one of them itself."""
        starts_NC, counts_NC = torch.zeros_like(self.starts_NC), torch.zeros_like(self.counts_NC)
        ids: list[Tensor] = []
        for part in parts:
            before = sum(map(len, ids))
            starts_NC += (part.starts_NC + before).masked_fill(part.counts_NC == 0, 0)
            counts_NC += part.counts_NC
            ids += part.ids
        self.starts_NC, self.counts_NC, self.ids = starts_NC, counts_NC, ids

    def _store(self, rows_T: Tensor, columns_T: Tensor, kept_TV: Tensor) -> None:
        place, token = kept_TV.nonzero(as_tuple=True)
        counts_T = torch.bincount(place, minlength=len(kept_TV))
        before = sum(len(ids) for ids in self.ids)
        self.starts_NC[rows_T, columns_T] = before + counts_T.cumsum(0) - counts_T
        self.counts_NC[rows_T, columns_T] = counts_T
        self.ids.append(token.int())

    def _look_up(self, rows_T: Tensor, columns_T: Tensor, vocabulary: int) -> Tensor:
        """Returns [T, V] bool: the tokens stored for these places."""
        if len(self.ids) > 1:
            self.ids = [torch.cat(self.ids)]
        starts_T, counts_T = self.starts_NC[rows_T, columns_T], self.counts_NC[rows_T, columns_T]
        kept_TV = torch.zeros(len(rows_T), vocabulary, dtype=torch.bool, device=rows_T.device)
        place = torch.arange(len(rows_T), device=rows_T.device).repeat_interleave(counts_T)
        within = torch.arange(len(place), device=rows_T.device)
        within += (starts_T - (counts_T.cumsum(0) - counts_T))[place]
        kept_TV[place, self.ids[0][within].long()] = True
        return kept_TV
