"""Statistics of a few seeds; docs/statistics.md says what is claimed and how it was tested.

The result of setting s on seed k is mean_s + seed_k + training noise + evaluation noise. The last
is known if the objective is a share of right answers: it is binomial.
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
# With more than two settings, the p of a pair's own test is multiplied by up to this factor: a
# setting that varies more than the others must not look different because of their small spread.
MAX_STRICTNESS = 2.5

Floats = NDArray[np.float64]
BySeed = Mapping[int, float]  # a setting's objective on each of its seeds


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


def mean_interval(values: Sequence[float], answer_count: int = 0) -> Interval | None:
    """Returns the `CONFIDENCE` interval of a setting's mean over all seeds; None below two seeds.

    Student's t. If each value is a share of right answers out of `answer_count`, half its width is
    at least two thirds of the evaluation's own standard error plus half a step of the scale: two
    seeds that happen to agree don't make the mean certain.
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
    """Returns the variance of a share of right answers out of `answer_count`; 0 if that is 0.

    Agresti and Coull (1998): with two more right and two more wrong answers, so it is never 0.
    """
    if not answer_count:
        return 0.0
    smoothed = (share * answer_count + 2) / (answer_count + 4)
    return smoothed * (1 - smoothed) / answer_count


@dataclass(frozen=True)
class Comparison:
    """Settings side by side, by least squares of value = setting + seed.

    Attributes:
        settings: S of them, each on at least two seeds.
        adjusted_means: [S], their least-squares means, which correct for missing seeds.
        inverse: [S, S], inverse of the normal equations; gives the variances of differences.
        variance: of the residuals; at least the evaluation's own variance.
        freedom: the residuals' degrees of freedom.
        answer_count: right or wrong answers that a value is a share of; 0: no share.
        seed_effects: what each seed adds, 0 on average; empty if that can't be told.
    """

    settings: Sequence[BySeed]
    adjusted_means: Floats
    inverse: Floats
    variance: float
    freedom: int
    answer_count: int
    seed_effects: BySeed

    def p(self, a: int, b: int) -> float:
        """Returns the p-value of two settings' difference, for all pairs of settings together.

        It is the larger of two: that of the Tukey-Kramer range test, in which all settings share
        one variance, and that of the pair's own t-test times `strictness`. It is 1 if nothing is
        known, or if the two tests see the settings in a different order.
        """
        alone, ahead = p_of_pair(self.settings[a], self.settings[b], self.answer_count)
        if self.freedom < 1 or ahead * (self.adjusted_means[a] - self.adjusted_means[b]) <= 0:
            return 1.0
        difference = self.studentized_difference(a, b)
        together = float(stats.studentized_range.sf(difference, *self.range_parameters))
        return max(together, min(1.0, strictness(len(self.settings)) * alone))

    def is_significant(self, a: int, b: int) -> bool:
        """Returns whether p <= 1 - `CONFIDENCE`; faster than computing p."""
        alone, ahead = p_of_pair(self.settings[a], self.settings[b], self.answer_count)
        return (
            self.freedom > 0
            and ahead * (self.adjusted_means[a] - self.adjusted_means[b]) > 0
            and strictness(len(self.settings)) * alone <= 1 - CONFIDENCE
            and self.studentized_difference(a, b) >= critical_range(*self.range_parameters)
        )

    def studentized_difference(self, a: int, b: int) -> float:
        """Returns the absolute difference in units of the studentized range."""
        unit = self.inverse[a, a] + self.inverse[b, b] - 2 * self.inverse[a, b]
        error = math.sqrt(self.variance * unit / 2)
        return abs(float(self.adjusted_means[a] - self.adjusted_means[b])) / error if error else 0.0

    @property
    def range_parameters(self) -> tuple[int, int]:
        return len(self.settings), self.freedom


def compare_settings(settings: Sequence[BySeed], answer_count: int = 0) -> Comparison:
    """Fits value = setting + seed to settings on at least two seeds each.

    Seeds' effects are left out if they can't be estimated, because settings share too few seeds.
    """
    seeds = sorted({seed for by_seed in settings for seed in by_seed})
    rows = [(s, seeds.index(k), y) for s, values in enumerate(settings) for k, y in values.items()]
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
    results = np.array([y for _, _, y in rows])
    found, *_ = np.linalg.lstsq(design, results)
    freedom = len(rows) - design.shape[1]
    rest = float(np.sum((results - design @ found) ** 2))
    least = float(np.mean([evaluation_variance(y, answer_count) for y in results]))
    variance = max(rest / freedom if freedom else 0.0, least)
    inverse = np.linalg.inv(design.T @ design)[:count, :count]
    told = [float(effect) for effect in found[count:]]
    effects = dict(zip(seeds, [*told, -sum(told)], strict=True)) if told else {}
    return Comparison(
        list(settings), found[:count], inverse, variance, freedom, answer_count, effects
    )


def strictness(settings: int) -> float:
    """Returns the factor on the p of a pair's own test: 1 with two settings, the only pair."""
    return min(settings - 1.0, MAX_STRICTNESS)


@cache
def critical_range(settings: int, freedom: int) -> float:
    return float(stats.studentized_range.ppf(CONFIDENCE, settings, freedom))


def p_of_pair(one: BySeed, other: BySeed, answer_count: int) -> tuple[float, float]:
    """Returns the two-sided p of two settings alone, and how much the first is ahead.

    A paired t-test on the seeds that both have, if there are at least two; else Welch's t-test.
    """
    common = sorted(set(one) & set(other))
    if len(common) > 1:
        apart = [one[seed] - other[seed] for seed in common]
        means = [float(np.mean([side[seed] for seed in common])) for side in (one, other)]
        least = sum(evaluation_variance(mean, answer_count) for mean in means)
        variance = max(float(np.var(apart, ddof=1)), least)
        ahead, error, freedom = float(np.mean(apart)), variance / len(common), len(common) - 1.0
    else:
        sides = [np.array(list(side.values())) for side in (one, other)]
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
    """Returns the true difference of two settings that so many seeds find with power `POWER`.

    By the harder of the two tests in `Comparison.p`, with each setting on the same seeds.

    Args:
        seed_std: the standard deviation of a result, seeds' own effects taken out.
    """
    freedom = (settings - 1) * (seeds - 1)
    together = critical_range(settings, freedom) / math.sqrt(2)
    alone = float(stats.t.ppf(1 - (1 - CONFIDENCE) / strictness(settings) / 2, seeds - 1))
    shift = max(detectable_shift(together, freedom), detectable_shift(alone, seeds - 1))
    return seed_std * math.sqrt(2 / seeds) * shift


def detectable_shift(critical: float, freedom: int) -> float:
    """Returns the mean, in standard errors, whose t exceeds `critical` with power `POWER`."""
    stds = stats.chi.ppf((np.arange(2000) + 0.5) / 2000, freedom) / math.sqrt(freedom)

    def excess_power(shift: float) -> float:  # scipy's noncentral t is NaN for large shifts
        return float(np.mean(stats.norm.sf(critical * stds - shift))) - POWER

    return float(optimize.brentq(excess_power, 0.0, 10 + 10 * critical))
