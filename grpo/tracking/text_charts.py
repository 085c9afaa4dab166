"""Curves drawn in characters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

LEVELS = " ▁▂▃▄▅▆▇█"


def draw_chart(values: Sequence[float], width: int, height: int = 1) -> list[str]:
    """Lines from the top, the newest value at the right end, the lowest a single mark high.

    Where there are more values than columns, a column is the mean of its share of them; where
    there are fewer, the curve is shorter. What is no number leaves its column empty.
    """
    columns = average_bins(values, width)
    known = [value for value in columns if value is not None]
    if not known:
        return [""] * height
    low, span = min(known), max(known) - min(known)
    steps = height * (len(LEVELS) - 1)
    tall = [
        0 if value is None else 1 + round((value - low) / span * (steps - 1)) if span else 1
        for value in columns
    ]
    rows = []
    for row in reversed(range(height)):
        filled = [max(0, min(len(LEVELS) - 1, own - row * (len(LEVELS) - 1))) for own in tall]
        rows.append("".join(LEVELS[own] for own in filled))
    return rows


def average_bins(values: Sequence[float | None], count: int) -> list[float | None]:
    """At most so many, each the mean of its share; none where a share holds no number."""
    found: list[float | None] = []
    for start, end in split_into_bins(len(values), count):
        own = [value for value in values[start:end] if value is not None and math.isfinite(value)]
        found.append(sum(own) / len(own) if own else None)
    return found


def split_into_bins(length: int, count: int) -> Iterable[tuple[int, int]]:
    """Where each of at most so many shares, alike in size, starts and ends."""
    count = min(count, length)
    return pairwise([length * n // count for n in range(count + 1)] if count else [])
