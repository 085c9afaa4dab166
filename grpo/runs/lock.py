"""One process at a time in a run's folder."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo.errors import ConfigError


class RunLocked(ConfigError):
    """Another process is in a run's folder, which is that one's to write."""


LOCK_WAIT = 1.0  # seconds that `is_locked` of another process may hold up a lock, at the very most


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keeps other processes out of a run's folder; the system lets go of it when a process dies.

    Raises:
        Occupied: another one is in it.
    """
    descriptor = os.open(run, os.O_RDONLY)
    try:
        until = time.monotonic() + LOCK_WAIT
        while not take_lock(descriptor, fcntl.LOCK_EX):
            if time.monotonic() > until:
                raise RunLocked(f"{run}: another process is running in this folder.")
            time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def is_locked(run: Path) -> bool:
    """Whether a process is in a run's folder, without keeping one out that wants to be."""
    descriptor = os.open(run, os.O_RDONLY)
    try:
        return not take_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def take_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
