"""Ctrl-C and SIGTERM end a run in order: the step is finished and saved."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

log = logging.getLogger(__name__)


class Interrupt:
    """Within it, a first signal sets `requested` for the loop to read; a second ends at once."""

    def __init__(self, also_requested: Callable[[], bool] = lambda: False) -> None:
        """also_requested: returns whether the end was requested in another way."""
        self.signalled, self.also_requested = False, also_requested
        self.previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.signalled or self.also_requested()

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True
        log.warning("finishing this step, then saving; a second Ctrl-C ends at once")
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self.previous = {}
