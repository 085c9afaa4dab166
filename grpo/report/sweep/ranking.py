"""Settings in order of their objective, and which of the differences the data supports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grpo.report.sweep.read import Job, Sweep
from grpo.report.sweep.statistics import Difference, Interval, difference, holm, mean_interval


@dataclass(frozen=True)
class Setting:
    """Jobs that differ in the seed alone."""

    values: tuple[Any, ...]  # of the sweep's keys
    by_seed: dict[int, float]  # the objective
    jobs: list[Job]  # that have one
    interval: Interval | None

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.by_seed.values())))


@dataclass(frozen=True)
class Ranking:
    """Best first, and how each compares with the best; p for all comparisons together (Holm)."""

    keys: list[str]
    settings: list[Setting]
    behind: list[Difference]  # of each but the best; how much the best is better
    p: list[float]
    minimized: bool

    @property
    def verdict(self) -> str:
        """What can be said of the best in a sentence or two."""
        if not self.settings:
            return "No job has finished yet."
        best, end = self.settings[0], "lowest" if self.minimized else "highest"
        if len(self.settings) == 1:
            return "There is one setting only, so nothing to compare."
        if all(len(setting.by_seed) < 2 for setting in self.settings):
            return (
                f"{self.named(best)} came out {end}, on one seed each: how much of that is luck "
                f"can't be said. Run the first few on more seeds: seed=0,1,2"
            )
        second = self.behind[0]
        if second.mean == 0:
            return f"{self.named(best)} and {self.named(self.settings[1])} came out alike."
        told = [n for n, p in enumerate(self.p) if p <= 0.05]
        text = f"{self.named(best)} came out {end}, and "
        text += (
            "the data tells it from every other setting."
            if len(told) == len(self.p)
            else f"the data tells it from {len(told)} of {len(self.p)} others."
        )
        if self.p[0] > 0.05:
            text += f" From the second, {self.named(self.settings[1])}, it is not told apart"
            if min(len(setting.by_seed) for setting in self.settings[:2]) < 2:
                text += "; one of the two has a single seed: run both on more, seed=0,1,2."
            elif not second.paired:
                text += "; they share no two seeds: run both on the same ones."
            elif second.more_seeds is None:
                text += "; more seeds would hardly change that."
            elif second.more_seeds == 0:
                text += " among so many comparisons; alone it would be."
            else:
                text += f"; about {second.more_seeds} more seeds of both would settle it."
        return text

    def named(self, setting: Setting) -> str:
        pairs = zip(self.keys, setting.values, strict=True)
        return " ".join(f"{key}={shown(value)}" for key, value in pairs) or "the setting"


def shown(value: object) -> str:
    if value is None:
        return "null"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def rank(sweep: Sweep) -> Ranking:
    """By the objective, the first of several."""
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for job in sweep.jobs:
        if job.value is not None:
            groups.setdefault(tuple(map(str, sweep.setting(job))), []).append(job)
    settings = [setting_of(sweep, jobs) for jobs in groups.values()]
    sign = -1.0 if sweep.minimized else 1.0
    settings.sort(key=lambda setting: -sign * setting.mean)
    best = settings[0].by_seed if settings else {}
    behind = [difference(best, setting.by_seed) for setting in settings[1:]]
    p = holm([one.p for one in behind])
    return Ranking(sweep.keys, settings, behind, p, sweep.minimized)


def setting_of(sweep: Sweep, jobs: Sequence[Job]) -> Setting:
    by_seed = {int(job.values.get("seed") or 0): float(job.value or 0.0) for job in jobs}
    values = list(by_seed.values())
    return Setting(sweep.setting(jobs[0]), by_seed, list(jobs), mean_interval(values))
