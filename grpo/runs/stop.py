"""What a sweep tells its jobs: whether they are to stop, and who writes to the terminal.

A sweep is stopped by a file, which every job looks for, wherever it runs. A signal would reach one
process, or all of a terminal; a launcher may run jobs in other processes, or on other machines that
share the folder.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

log = logging.getLogger(__name__)

STOP_FILE_VARIABLE = "GRPO_STOP_FILE"  # processes that a launcher starts inherit it
VIEW_VARIABLE = "GRPO_SWEEP_VIEW"  # inherited too: the id of the process that shows the sweep


def is_sweep_job() -> bool:
    """Returns whether this process runs a job of a sweep."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def is_stop_requested() -> bool:
    """Returns whether the sweep that this job belongs to is to stop."""
    file = os.environ.get(STOP_FILE_VARIABLE)
    return file is not None and Path(file).exists()


def has_sweep_view() -> bool:
    """Returns whether the sweep shows the progress of its jobs in the terminal."""
    return VIEW_VARIABLE in os.environ


def leave_terminal() -> None:
    """Silences a job in the terminal if another process shows the sweep; its log file has all."""
    if (
        not has_sweep_view()
        or os.environ[VIEW_VARIABLE] == str(os.getpid())
        or not sys.stdout.isatty()
    ):
        return
    sys.stdout = devnull = open(os.devnull, "w")  # noqa: SIM115
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(
            handler, logging.FileHandler
        ):
            handler.setStream(devnull)


def request_stop() -> None:
    """Stops the sweep: running jobs finish their step and save, the others don't begin."""
    if file := os.environ.get(STOP_FILE_VARIABLE):
        Path(file).touch()


@contextmanager
def stoppable(sweep: Path) -> Iterator[None]:
    """Within it, a first signal stops the sweep; a second one ends this process at once.

    Raises:
        SystemExit: 130, at its end, if the sweep was asked to stop.
    """
    file = sweep.absolute() / f".stop-{socket.gethostname()}-{os.getpid()}"
    file.unlink(missing_ok=True)
    os.environ[STOP_FILE_VARIABLE] = str(file)
    previous: dict[signal.Signals, object] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def request(number: int, frame: FrameType | None) -> None:
        restore()
        file.touch()
        log.warning("running jobs finish their step and save; a second Ctrl-C ends at once")

    if threading.current_thread() is threading.main_thread():
        previous |= {n: signal.signal(n, request) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
        if file.exists():
            raise SystemExit(130)
    finally:
        restore()
        os.environ.pop(STOP_FILE_VARIABLE, None)
        file.unlink(missing_ok=True)
