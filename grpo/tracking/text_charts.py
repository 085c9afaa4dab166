"""Curves drawn in characters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

LEVELS = " ▁▂▃▄▅▆▇█"


def draw_chart(values: Sequence[float], width: int, height: int = 1) -> list[str]:
    """Draws a curve as `height` lines, the top one first, with the newest value at the right end.

    The lowest value is one mark high. If there are more values than columns, a column is the mean
    of its share of them; if fewer, the curve is shorter. A column without a finite value is empty.
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
        filled = [max(0, min(len(LEVELS) - 1, marks - row * (len(LEVELS) - 1))) for marks in tall]
        rows.append("".join(LEVELS[level] for level in filled))
    return rows


def average_bins(values: Sequence[float | None], count: int) -> list[float | None]:
    """Returns the means of at most `count` bins; None for a bin without a finite value."""
    found: list[float | None] = []
    for start, end in split_into_bins(len(values), count):
        finite = [v for v in values[start:end] if v is not None and math.isfinite(v)]
        found.append(sum(finite) / len(finite) if finite else None)
    return found


def split_into_bins(length: int, count: int) -> Iterable[tuple[int, int]]:
    """Returns the start and end of at most `count` bins of nearly equal size."""
    count = min(count, length)
    return pairwise([length * n // count for n in range(count + 1)] if count else [])
