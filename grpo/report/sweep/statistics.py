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

CONFIDENCE = 0.95
POWER = 0.8
# Where there are more than two settings, a pair's own test counts up to so much more strictly: one
# that varies more than the others must not be told apart by their small spread.
MAX_STRICTNESS = 2.5

Floats = NDArray[np.float64]
BySeed = Mapping[int, float]  # a setting's objective on each of its seeds


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


def mean_interval(values: Sequence[float], answer_count: int = 0) -> Interval | None:
    """Where a setting's mean over all seeds lies, at `CONFIDENCE`; None for fewer than two seeds.

    Student's t. Where each value is a share of `trials` right answers, it is never narrower than
    two thirds of the evaluation's own standard error and half a step of the scale: two seeds that
    happen to agree don't make it certain.
    """
    count = len(values)
    if count < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(count)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    if answer_count:
        evaluation = math.sqrt(evaluation_variance(mean, answer_count * count))
        half = max(half, 2 / 3 * evaluation + 1 / (2 * answer_count))
        return Interval(max(0.0, mean - half), min(1.0, mean + half))
    return Interval(mean - half, mean + half)


def evaluation_variance(share: float, answer_count: int) -> float:
    """The variance of a share of right answers out of `trials`; 0 where there are none.

    Agresti and Coull (1998): as of two more right and two more wrong, so that it is never 0.
    """
    if not answer_count:
        return 0.0
    smoothed = (share * answer_count + 2) / (answer_count + 4)
    return smoothed * (1 - smoothed) / answer_count


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
        seed_effects: what each seed adds, 0 on average; empty where that can't be told.
    """

    settings: Sequence[BySeed]
    adjusted_means: Floats
    inverse: Floats
    variance: float
    freedom: int
    answer_count: int
    seed_effects: BySeed

    def p(self, a: int, b: int) -> float:
        """That two settings are equal, for all pairs of settings together; 1: nothing is known.

        The larger of two: that of Tukey's and Kramer's range test, in which all settings share one
        variance, and that of the two settings' own t-test, `strictness` times. Where they see the
        two in a different order, it is 1.
        """
        alone, ahead = p_of_pair(self.settings[a], self.settings[b], self.answer_count)
        if self.freedom < 1 or ahead * (self.adjusted_means[a] - self.adjusted_means[b]) <= 0:
            return 1.0
        own = min(1.0, strictness(len(self.settings)) * alone)
        return max(
            float(
                stats.studentized_range.sf(
                    self.studentized_difference(a, b), *self.range_parameters
                )
            ),
            own,
        )

    def is_significant(self, a: int, b: int) -> bool:
        """The same as p <= 1 - `CONFIDENCE`, sooner."""
        alone, ahead = p_of_pair(self.settings[a], self.settings[b], self.answer_count)
        return (
            self.freedom > 0
            and ahead * (self.adjusted_means[a] - self.adjusted_means[b]) > 0
            and strictness(len(self.settings)) * alone <= 1 - CONFIDENCE
            and self.studentized_difference(a, b) >= critical_range(*self.range_parameters)
        )

    def studentized_difference(self, a: int, b: int) -> float:
        """The difference in units of the studentized range."""
        unit = self.inverse[a, a] + self.inverse[b, b] - 2 * self.inverse[a, b]
        error = math.sqrt(self.variance * unit / 2)
        return abs(float(self.adjusted_means[a] - self.adjusted_means[b])) / error if error else 0.0

    @property
    def range_parameters(self) -> tuple[int, int]:
        return len(self.settings), self.freedom


def compare_settings(settings: Sequence[BySeed], answer_count: int = 0) -> Comparison:
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
    least = float(np.mean([evaluation_variance(y, answer_count) for y in values]))
    variance = max(rest / freedom if freedom else 0.0, least)
    inverse = np.linalg.inv(design.T @ design)[:count, :count]
    told = [float(effect) for effect in found[count:]]
    effects = dict(zip(seeds, [*told, -sum(told)], strict=True)) if told else {}
    return Comparison(
        list(settings), found[:count], inverse, variance, freedom, answer_count, effects
    )


def strictness(settings: int) -> float:
    """How much more strictly a pair's own test counts: of two settings, it is all there is."""
    return min(settings - 1.0, MAX_STRICTNESS)


@cache
def critical_range(settings: int, freedom: int) -> float:
    return float(stats.studentized_range.ppf(CONFIDENCE, settings, freedom))


def p_of_pair(one: BySeed, other: BySeed, answer_count: int) -> tuple[float, float]:
    """Two-sided p of two settings alone, and how much the first is ahead."""
    common = sorted(set(one) & set(other))
    if len(common) > 1:
        apart = [one[seed] - other[seed] for seed in common]
        means = [float(np.mean([own[seed] for seed in common])) for own in (one, other)]
        least = sum(evaluation_variance(mean, answer_count) for mean in means)
        variance = max(float(np.var(apart, ddof=1)), least)
        ahead, error, freedom = float(np.mean(apart)), variance / len(common), len(common) - 1.0
    else:
        sides = [np.array(list(own.values())) for own in (one, other)]
        errors = [
            max(float(np.var(y, ddof=1)), evaluation_variance(float(y.mean()), answer_count))
            / len(y)
            for y in sides
        ]
        ahead, error = float(sides[0].mean() - sides[1].mean()), sum(errors)
        parts = [e**2 / (len(y) - 1) for e, y in zip(errors, sides, strict=True)]
        freedom = error**2 / sum(parts) if error else 1.0  # Welch (1947)
    if error == 0:
        return 1.0, ahead  # no spread to judge a difference by
    return float(2 * stats.t.sf(abs(ahead) / math.sqrt(error), freedom)), ahead


def detectable_difference(seed_std: float, settings: int, seeds: int) -> float:
    """The true difference of two settings that so many seeds tell with a chance of `POWER`.

    By the harder of the two tests that `compare_settings` asks, each setting on the same seeds.

    Args:
        spread: the standard deviation of a result, seeds' own effects taken out.
    """
    freedom = (settings - 1) * (seeds - 1)
    together = critical_range(settings, freedom) / math.sqrt(2)
    alone = float(stats.t.ppf(1 - (1 - CONFIDENCE) / strictness(settings) / 2, seeds - 1))
    shift = max(detectable_shift(together, freedom), detectable_shift(alone, seeds - 1))
    return seed_std * math.sqrt(2 / seeds) * shift


def detectable_shift(critical: float, freedom: int) -> float:
    """How many standard errors a mean has to be off for its t to pass `critical`, at `POWER`."""
    shown = stats.chi.ppf((np.arange(2000) + 0.5) / 2000, freedom) / math.sqrt(freedom)

    def short(shift: float) -> float:  # scipy's noncentral t has no number for large shifts
        return float(np.mean(stats.norm.sf(critical * shown - shift))) - POWER

    return float(optimize.brentq(short, 0.0, 10 + 10 * critical))
