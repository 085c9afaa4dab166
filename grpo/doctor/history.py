"""A run's metrics so far, with the means that diagnoses use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from grpo.config.schema import DoctorConfig

MetricsLine = Mapping[str, Any]  # one line of metrics.jsonl


@dataclass(frozen=True)
class RunHistory:
    """The metrics of a run so far, its config and the doctor's limits."""

    lines: Sequence[MetricsLine]
    config: Mapping[str, Any]
    limits: DoctorConfig

    @cached_property
    def steps(self) -> list[MetricsLine]:
        return [line for line in self.lines if "time/step" in line]

    @cached_property
    def evaluations(self) -> list[MetricsLine]:
        return [line for line in self.lines if "eval/accuracy" in line]

    def values(self, metric: str) -> list[float]:
        """Returns a metric's values over the steps that have it."""
        return [line[metric] for line in self.steps if line.get(metric) is not None]

    def recent_mean(self, metric: str) -> float | None:
        """Returns a metric's mean over the last `window` steps; None if it isn't logged."""
        values = self.values(metric)[-self.limits.window :]
        return fmean(values) if values else None

    def first_and_last_means(self, metric: str) -> tuple[float, float] | None:
        """Returns its means over the first and the last `window` steps; None if not logged."""
        values, window = self.values(metric), self.limits.window
        return (fmean(values[:window]), fmean(values[-window:])) if values else None
