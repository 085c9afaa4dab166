"""An endless order over the training rows, where any place can be sought by its number."""

from __future__ import annotations

import math
from functools import lru_cache

import torch


def batch_indices(step: int, batch_size: int, rows: int, seed: int) -> list[int]:
    """The rows of a step's batch, step 1 first.

    Each epoch is a permutation of its own; a batch may end one epoch and begin the next, so no
    size has to divide another. Nothing but the step has to be remembered to go on.
    """
    first = (step - 1) * batch_size
    return [epoch_order(k // rows, rows, seed)[k % rows] for k in range(first, first + batch_size)]


@lru_cache(maxsize=2)
def epoch_order(epoch: int, rows: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(rows, generator=generator).tolist()


def total_steps(rows: int, batch_size: int, num_epochs: int, max_steps: int | None) -> int:
    """Steps until every row was seen `num_epochs` times, or `max_steps` if given."""
    if max_steps is not None:
        return max_steps
    return math.ceil(num_epochs * rows / batch_size)
