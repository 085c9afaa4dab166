"""A stopwatch for a run and for the parts of a step."""

from __future__ import annotations

import time


class Clock:
    """Measures the seconds since its creation plus `seconds_before`, and since the last lap."""

    def __init__(self, seconds_before: float = 0.0) -> None:
        self.started = self.last_lap = time.perf_counter()
        self.seconds_before = seconds_before

    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self.last_lap = now - self.last_lap, now
        return seconds
