"""Ranks settings by their objective, and says which differences are significant."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grpo.report.sweep.read import Job, Sweep
from grpo.report.sweep.statistics import (
    CONFIDENCE,
    Interval,
    compare_settings,
    detectable_difference,
    mean_interval,
)


@dataclass(frozen=True)
class Setting:
    """Jobs that differ only in the seed."""

    values: tuple[Any, ...]  # of the sweep's keys
    by_seed: dict[int, float]  # the objective
    jobs: list[Job]  # that have an objective
    interval: Interval | None  # of its mean

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.by_seed.values())))


@dataclass(frozen=True)
class Ranking:
    """Settings, best first, and how each compares with the best.

    Attributes:
        adjusted_means: what settings are ranked by: their means, corrected for missing seeds.
        p: p-value of each setting but the best, against the best; for all comparisons together.
        seed_std: standard deviation of a result, seeds' own effects taken out; NaN if no setting
            has two seeds.
        has_missing_seeds: whether some settings lack seeds that others have.
    """

    keys: list[str]
    settings: list[Setting]
    adjusted_means: list[float]
    p: list[float]
    minimized: bool
    seed_std: float = math.nan
    has_missing_seeds: bool = False

    @property
    def gaps_to_best(self) -> list[float]:
        """How much better the best is than each of the others."""
        sign = -1.0 if self.minimized else 1.0
        return [sign * (self.adjusted_means[0] - mean) for mean in self.adjusted_means[1:]]

    @property
    def significant(self) -> list[bool]:
        """For each setting but the best, whether it differs significantly from the best."""
        return [p <= 1 - CONFIDENCE for p in self.p]

    @property
    def ties(self) -> list[Setting]:
        """The best setting and all whose means equal its mean to the last digit."""
        means = zip(self.settings, self.adjusted_means, strict=True)
        return [setting for setting, mean in means if mean == self.adjusted_means[0]]

    @property
    def conclusion(self) -> str:
        """Describes the best setting in one or two sentences."""
        if not self.settings:
            return "No job has finished with a value of the objective yet."
        best, end = self.settings[0], "lowest" if self.minimized else "highest"
        value = format_value(self.adjusted_means[0])
        if len(self.settings) == 1:
            return f"There is only one setting, at {value}, so there is nothing to compare."
        tied = len(self.ties)
        if tied > 1:
            named = [self.format_setting(setting) for setting in self.ties]
            text = f"{', '.join(named[:-1])} and {named[-1]} are tied at {value}, the {end}"
        else:
            text = f"{self.format_setting(best)} came out {end}, at {value}"
        if all(len(setting.by_seed) < 2 for setting in self.settings):
            return (
                f"{text}, on one seed each, so the differences may be noise. "
                f"Run the best few on more seeds: seed=0,1,2"
            )
        others = self.significant[tied - 1 :]  # the tied settings come first
        if not others:
            return f"{text}."
        text += ". The first is" if tied > 1 else ","
        count = sum(others)
        if count == len(others):
            return f"{text} significantly better than every other setting."
        if count:
            text += f" significantly better than {count} of {len(others)} others."
        else:
            but = "" if tied > 1 else " but"
            text += f"{but} not significantly better than any other setting."
        nearest = tied + others.index(False)
        name = self.format_setting(self.settings[nearest])
        text += f" The difference from {name} is not significant"
        return f"{text}{self.explain_insignificance(nearest)}."

    def explain_insignificance(self, place: int) -> str:
        """Explains why a setting's difference from the best isn't significant, and what helps."""
        seeds = [len(self.settings[n].by_seed) for n in (0, place)]
        if min(seeds) < 2:
            return ": one of the two has a single seed; run both on more, seed=0,1,2"
        counted = sum(len(setting.by_seed) > 1 for setting in self.settings)
        least = (
            detectable_difference(self.seed_std, counted, min(seeds))
            if self.seed_std > 0
            else math.nan
        )
        if math.isnan(least):
            return ": there is no spread to judge a difference by"
        more = detectable_difference(self.seed_std, counted, 2 * min(seeds))
        return (
            f": they differ by {self.gaps_to_best[place - 1]:.2g}; {min(seeds)} seeds each find a "
            f"difference of {least:.2g} four times in five, {2 * min(seeds)} one of {more:.2g}"
        )

    def format_setting(self, setting: Setting) -> str:
        pairs = zip(self.keys, setting.values, strict=True)
        return " ".join(f"{key}={format_value(value)}" for key, value in pairs) or "the setting"


def format_value(value: object) -> str:
    if value is None:
        return "null"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def rank_settings(sweep: Sweep) -> Ranking:
    """Ranks a sweep's settings by its first objective."""
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for job in sweep.jobs:
        if job.value is not None:
            groups.setdefault(tuple(map(str, sweep.get_setting_values(job))), []).append(job)
    settings = [make_setting(sweep, jobs) for jobs in groups.values()]
    repeated = [n for n, setting in enumerate(settings) if len(setting.by_seed) > 1]
    means = [setting.mean for setting in settings]
    comparison = None
    if repeated:
        trials = min(job.answer_count for setting in settings for job in setting.jobs)
        comparison = compare_settings([settings[n].by_seed for n in repeated], trials)
        for n, mean in zip(repeated, comparison.adjusted_means, strict=True):
            means[n] = float(mean)
        for n in set(range(len(settings))) - set(repeated):
            ((seed, value),) = settings[n].by_seed.items()
            means[n] = value - comparison.seed_effects.get(seed, 0.0)
    means = [round(mean, 12) for mean in means]  # so that rounding errors break no tie
    sign = -1.0 if sweep.minimized else 1.0
    order = sorted(range(len(settings)), key=lambda n: -sign * means[n])

    def p(n: int) -> float:
        if comparison is None or not {order[0], n} <= set(repeated):
            return 1.0
        return comparison.p(repeated.index(order[0]), repeated.index(n))

    return Ranking(
        keys=sweep.keys,
        settings=[settings[n] for n in order],
        adjusted_means=[means[n] for n in order],
        p=[p(n) for n in order[1:]],
        minimized=sweep.minimized,
        # Rounded, so that values without any spread have none.
        seed_std=round(math.sqrt(comparison.variance), 12) if comparison else math.nan,
        has_missing_seeds=len({frozenset(setting.by_seed) for setting in settings}) > 1,
    )


def make_setting(sweep: Sweep, jobs: Sequence[Job]) -> Setting:
    values = defaultdict(list)  # several of a seed where sweeps that share jobs are read together
    for job in jobs:
        values[int(job.values.get("seed") or 0)].append(float(job.value or 0.0))
    by_seed = {seed: statistics.fmean(of_seed) for seed, of_seed in values.items()}
    trials = min(job.answer_count for job in jobs)
    interval = mean_interval(list(by_seed.values()), trials)
    return Setting(sweep.get_setting_values(jobs[0]), by_seed, list(jobs), interval)
