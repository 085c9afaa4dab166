"""What a handful of seeds lets one say: means with intervals, differences, and how many more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Where the mean may lie, by resampling the seeds (Efron 1979); None for fewer than two."""
    if len(values) < 2:
        return None
    if len(set(values)) == 1:
        return Interval(values[0], values[0])
    found = stats.bootstrap(
        (np.asarray(values),), np.mean, n_resamples=9999, confidence_level=LEVEL,
        method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return Interval(float(found.low), float(found.high))


@dataclass(frozen=True)
class Difference:
    """How much better one setting is than another."""

    mean: float
    p: float  # that it is at least so large by chance; 1 where there is too little to say
    paired: int  # seeds that both have; 0: compared without pairs
    more_seeds: int | None  # to settle it, were the difference what it seems; None: no telling

    @property
    def supported(self) -> bool:
        return self.p <= 1 - LEVEL


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> Difference:
    """Of the objective by seed. On the seeds that both have, by Student's paired t-test.

    Without two of those, by Welch's test of two samples.
    """
    common = sorted(set(one) & set(other))
    if len(common) >= 2:
        differences = [one[seed] - other[seed] for seed in common]
        mean = float(np.mean(differences))
        return Difference(mean, t_test(differences), len(common), more_seeds(differences))
    mean = float(np.mean(list(one.values())) - np.mean(list(other.values())))
    if min(len(one), len(other)) < 2:
        return Difference(mean, 1.0, len(common), None)
    p = float(stats.ttest_ind(list(one.values()), list(other.values()), equal_var=False).pvalue)
    return Difference(mean, 1.0 if math.isnan(p) else p, 0, None)


def t_test(differences: Sequence[float]) -> float:
    """Two-sided p that their mean is 0."""
    if float(np.std(differences)) == 0:
        return 1.0 if differences[0] == 0 else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def more_seeds(differences: Sequence[float], most: int = 10_000) -> int | None:
    """How many more pairs would tell a difference like this one from 0, four times in five.

    From the power of the t-test at these differences' mean and spread; None where more than `most`.
    """
    mean, spread = abs(float(np.mean(differences))), float(np.std(differences, ddof=1))
    if mean == 0:
        return None
    if spread == 0:
        return 0
    low, high = 2, most
    if power(mean / spread, high) < POWER:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if power(mean / spread, middle) >= POWER else (middle + 1, high)
    return max(0, low - len(differences))


def power(effect: float, pairs: int) -> float:
    """Of a two-sided paired t-test; effect: the mean difference in standard deviations."""
    critical = stats.t.ppf(1 - (1 - LEVEL) / 2, pairs - 1)
    shift = effect * math.sqrt(pairs)
    freedom = pairs - 1
    # Over the spread that the sample may show; scipy's noncentral t has no number for large shifts.
    spread = stats.chi.ppf((np.arange(2000) + 0.5) / 2000, freedom) / math.sqrt(freedom)
    found = stats.norm.sf(critical * spread - shift) + stats.norm.cdf(-critical * spread - shift)
    return float(np.mean(found))


def holm(ps: Sequence[float]) -> list[float]:
    """Each p, made larger for there being several (Holm 1979)."""
    order = sorted(range(len(ps)), key=lambda n: ps[n])
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, n in enumerate(order):
        largest = max(largest, min(1.0, ps[n] * (len(ps) - rank)))
        adjusted[n] = largest
    return adjusted
