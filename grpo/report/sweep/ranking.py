"""Settings in order of their objective, and which of the differences the data supports."""

from __future__ import annotations

import math
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
    """Jobs that differ in the seed alone."""

    values: tuple[Any, ...]  # of the sweep's keys
    by_seed: dict[int, float]  # the objective
    jobs: list[Job]  # that have one
    interval: Interval | None  # of its mean

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.by_seed.values())))


@dataclass(frozen=True)
class Ranking:
    """Best first, and how each compares with the best.

    Attributes:
        levels: by which settings are ranked: their means, on equal terms where they lack seeds.
        p: of each but the best, that it is no worse; for all comparisons together.
        spread: of a result from seed to seed; NaN where no setting has two.
        unequal: some settings lack seeds that others have.
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
        return [sign * (self.adjusted_means[0] - level) for level in self.adjusted_means[1:]]

    @property
    def significant(self) -> list[bool]:
        """Of each but the best, whether the data tells it from the best."""
        return [p <= 1 - CONFIDENCE for p in self.p]

    @property
    def ties(self) -> list[Setting]:
        """The best and all that came out equal to it to the last digit."""
        levels = zip(self.settings, self.adjusted_means, strict=True)
        return [setting for setting, level in levels if level == self.adjusted_means[0]]

    @property
    def conclusion(self) -> str:
        """What can be said of the best in a sentence or two."""
        if not self.settings:
            return "No job has finished with a value of the objective yet."
        best, end = self.settings[0], "lowest" if self.minimized else "highest"
        value = format_value(self.adjusted_means[0])
        if len(self.settings) == 1:
            return f"There is one setting only, at {value}, so nothing to compare."
        if len(self.ties) > 1:
            named = [self.format_setting(setting) for setting in self.ties]
            text = f"{', '.join(named[:-1])} and {named[-1]} are tied at {value}, the {end}"
        else:
            text = f"{self.format_setting(best)} came out {end}, at {value}"
        if all(len(setting.by_seed) < 2 for setting in self.settings):
            return (
                f"{text}, on one seed each, so the differences may be noise. "
                f"Run the first few on more seeds: seed=0,1,2"
            )
        told = sum(self.significant)
        if told == len(self.p):
            return f"{text}, and the data tells it from every other setting."
        text += (
            f", and the data tells it from {told} of {len(self.p)} others."
            if told
            else ", and the data tells it from no other setting."
        )
        nearest = self.significant.index(False) + 1
        text += f" From {self.format_setting(self.settings[nearest])} it is not told apart"
        return f"{text}{self.explain_insignificance(nearest)}."

    def explain_insignificance(self, place: int) -> str:
        """Why a setting isn't told from the best, and what would help."""
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
            f": they differ by {self.gaps_to_best[place - 1]:.2g}; {min(seeds)} seeds each tell a "
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
    """By the objective, the first of several."""
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for job in sweep.jobs:
        if job.value is not None:
            groups.setdefault(tuple(map(str, sweep.get_setting_values(job))), []).append(job)
    settings = [make_setting(sweep, jobs) for jobs in groups.values()]
    repeated = [n for n, setting in enumerate(settings) if len(setting.by_seed) > 1]
    levels = [setting.mean for setting in settings]
    found = None
    if repeated:
        trials = min(job.answer_count for setting in settings for job in setting.jobs)
        found = compare_settings([settings[n].by_seed for n in repeated], trials)
        for n, level in zip(repeated, found.adjusted_means, strict=True):
            levels[n] = float(level)
    levels = [round(level, 12) for level in levels]  # so that a tie is one
    sign = -1.0 if sweep.minimized else 1.0
    order = sorted(range(len(settings)), key=lambda n: -sign * levels[n])

    def p(n: int) -> float:
        if found is None or not {order[0], n} <= set(repeated):
            return 1.0
        return found.p(repeated.index(order[0]), repeated.index(n))

    return Ranking(
        keys=sweep.keys,
        settings=[settings[n] for n in order],
        adjusted_means=[levels[n] for n in order],
        p=[p(n) for n in order[1:]],
        minimized=sweep.minimized,
        seed_std=math.sqrt(found.variance) if found else math.nan,
        has_missing_seeds=len({frozenset(setting.by_seed) for setting in settings}) > 1,
    )


def make_setting(sweep: Sweep, jobs: Sequence[Job]) -> Setting:
    by_seed = {int(job.values.get("seed") or 0): float(job.value or 0.0) for job in jobs}
    trials = min(job.answer_count for job in jobs)
    interval = mean_interval(list(by_seed.values()), trials)
    return Setting(sweep.get_setting_values(jobs[0]), by_seed, list(jobs), interval)
