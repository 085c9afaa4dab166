"""What a handful of seeds lets one say. docs/statistics.md: what is claimed, and how it was tested.

A setting s on a seed k comes to mean_s + seed_k + training noise + evaluation noise. The last is
known where the objective is a share of right answers: it is binomial.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

LEVEL = 0.95
POWER = 0.8
# Where there are more than two settings, a pair's own test counts up to so much more strictly: one
# that varies more than the others must not be told apart by their small spread.
STRICTER = 2.5

Floats = NDArray[np.float64]
BySeed = Mapping[int, float]  # a setting's objective on each of its seeds


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


def mean_interval(values: Sequence[float], trials: int = 0) -> Interval | None:
    """Where a setting's mean over all seeds lies, at `LEVEL`; None for fewer than two seeds.

    Student's t. Where each value is a share of `trials` right answers, it is never narrower than
    two thirds of the evaluation's own standard error and half a step of the scale: two seeds that
    happen to agree don't make it certain.
    """
    count = len(values)
    if count < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(count)
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    if trials:
        evaluation = math.sqrt(evaluation_variance(mean, trials * count))
        half = max(half, 2 / 3 * evaluation + 1 / (2 * trials))
        return Interval(max(0.0, mean - half), min(1.0, mean + half))
    return Interval(mean - half, mean + half)


def evaluation_variance(share: float, trials: int) -> float:
    """The variance of a share of right answers out of `trials`; 0 where there are none.

    Agresti and Coull (1998): as of two more right and two more wrong, so that it is never 0.
    """
    if not trials:
        return 0.0
    smoothed = (share * trials + 2) / (trials + 4)
    return smoothed * (1 - smoothed) / trials


@dataclass(frozen=True)
class Comparison:
    """Settings side by side, by least squares of value = setting + seed.

    Attributes:
        settings: S of them, each on two seeds at least.
        levels: [S], their least-squares means: where settings lack seeds, what those seeds would
            change is taken out.
        inverse: [S, S], of the normal equations: what the variances of differences are made of.
        variance: of what settings and seeds leave; never below the evaluation's own.
        freedom: the degrees of freedom that it is known by.
        trials: of how many right or wrong answers a value is the share; 0: of none.
    """

    settings: Sequence[BySeed]
    levels: Floats
    inverse: Floats
    variance: float
    freedom: int
    trials: int

    def p(self, a: int, b: int) -> float:
        """That two settings are equal, for all pairs of settings together; 1: nothing is known.

        The larger of two: that of Tukey's and Kramer's range test, in which all settings share one
        variance, and that of the two settings' own t-test, `strictness` times. Where they see the
        two in a different order, it is 1.
        """
        alone, ahead = p_of_pair(self.settings[a], self.settings[b], self.trials)
        if self.freedom < 1 or ahead * (self.levels[a] - self.levels[b]) <= 0:
            return 1.0
        own = min(1.0, strictness(len(self.settings)) * alone)
        return max(float(stats.studentized_range.sf(self.apart(a, b), *self.range)), own)

    def told(self, a: int, b: int) -> bool:
        """The same as p <= 1 - `LEVEL`, sooner."""
        alone, ahead = p_of_pair(self.settings[a], self.settings[b], self.trials)
        return (
            self.freedom > 0
            and ahead * (self.levels[a] - self.levels[b]) > 0
            and strictness(len(self.settings)) * alone <= 1 - LEVEL
            and self.apart(a, b) >= critical_range(*self.range)
        )

    def apart(self, a: int, b: int) -> float:
        """The difference in units of the studentized range."""
        unit = self.inverse[a, a] + self.inverse[b, b] - 2 * self.inverse[a, b]
        error = math.sqrt(self.variance * unit / 2)
        return abs(float(self.levels[a] - self.levels[b])) / error if error else 0.0

    @property
    def range(self) -> tuple[int, int]:
        return len(self.settings), self.freedom


def compare(settings: Sequence[BySeed], trials: int = 0) -> Comparison:
    """Fits settings, each on two seeds at least; with seeds' effects where these can be told.

    They can't where settings share too few seeds, as where each has seeds of its own.
    """
    seeds = sorted({seed for own in settings for seed in own})
    rows = [(s, seeds.index(k), y) for s, own in enumerate(settings) for k, y in own.items()]
    count = len(settings)
    design = np.zeros((len(rows), count + len(seeds) - 1))
    for n, (s, k, _) in enumerate(rows):
        design[n, s] = 1
        if k < len(seeds) - 1:
            design[n, count + k] = 1
        else:  # the effects of all seeds add up to 0
            design[n, count:] = -1
    if np.linalg.matrix_rank(design) < design.shape[1]:
        design = design[:, :count]
    values = np.array([y for _, _, y in rows])
    found, *_ = np.linalg.lstsq(design, values)
    freedom = len(rows) - design.shape[1]
    rest = float(np.sum((values - design @ found) ** 2))
    least = float(np.mean([evaluation_variance(y, trials) for y in values]))
    variance = max(rest / freedom if freedom else 0.0, least)
    inverse = np.linalg.inv(design.T @ design)[:count, :count]
    return Comparison(list(settings), found[:count], inverse, variance, freedom, trials)


def strictness(settings: int) -> float:
    """How much more strictly a pair's own test counts: of two settings, it is all there is."""
    return min(settings - 1.0, STRICTER)


@cache
def critical_range(settings: int, freedom: int) -> float:
    return float(stats.studentized_range.ppf(LEVEL, settings, freedom))


def p_of_pair(one: BySeed, other: BySeed, trials: int) -> tuple[float, float]:
    """Two-sided p of two settings alone, and how much the first is ahead."""
    common = sorted(set(one) & set(other))
    if len(common) > 1:
        apart = [one[seed] - other[seed] for seed in common]
        means = [float(np.mean([own[seed] for seed in common])) for own in (one, other)]
        least = sum(evaluation_variance(mean, trials) for mean in means)
        variance = max(float(np.var(apart, ddof=1)), least)
        ahead, error, freedom = float(np.mean(apart)), variance / len(common), len(common) - 1.0
    else:
        sides = [np.array(list(own.values())) for own in (one, other)]
        errors = [
            max(float(np.var(y, ddof=1)), evaluation_variance(float(y.mean()), trials)) / len(y)
            for y in sides
        ]
        ahead, error = float(sides[0].mean() - sides[1].mean()), sum(errors)
        parts = [e**2 / (len(y) - 1) for e, y in zip(errors, sides, strict=True)]
        freedom = error**2 / sum(parts) if error else 1.0  # Welch (1947)
    if error == 0:
        return 1.0, ahead  # no spread to judge a difference by
    return float(2 * stats.t.sf(abs(ahead) / math.sqrt(error), freedom)), ahead


def least_difference(spread: float, settings: int, seeds: int) -> float:
    """The true difference of two settings that so many seeds tell with a chance of `POWER`.

    By the harder of the two tests that `compare` asks, each setting on the same seeds.

    Args:
        spread: the standard deviation of a result, seeds' own effects taken out.
    """
    freedom = (settings - 1) * (seeds - 1)
    together = critical_range(settings, freedom) / math.sqrt(2)
    alone = float(stats.t.ppf(1 - (1 - LEVEL) / strictness(settings) / 2, seeds - 1))
    shift = max(shift_told(together, freedom), shift_told(alone, seeds - 1))
    return spread * math.sqrt(2 / seeds) * shift


def shift_told(critical: float, freedom: int) -> float:
    """How many standard errors a mean has to be off for its t to pass `critical`, at `POWER`."""
    shown = stats.chi.ppf((np.arange(2000) + 0.5) / 2000, freedom) / math.sqrt(freedom)

    def short(shift: float) -> float:  # scipy's noncentral t has no number for large shifts
        return float(np.mean(stats.norm.sf(critical * shown - shift))) - POWER

    return float(optimize.brentq(short, 0.0, 10 + 10 * critical))
