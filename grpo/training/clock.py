"""Where the time goes."""

from __future__ import annotations

import time


class Clock:
    """Seconds since it was made, plus those before; and since the last lap."""

    def __init__(self, before: float = 0.0) -> None:
        self.started = self.lapped = time.perf_counter()
        self.before = before

    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.started

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self.lapped = now - self.lapped, now
        return seconds
