"""Locks that let one process at a time use a run's folder.

The folder itself is locked, not a file in it, so that a lock leaves nothing behind, and whether a
folder is locked can be read where nothing can be written.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo.errors import ConfigError


class RunLocked(ConfigError):
    """Another process is using a run's folder."""


LOCK_WAIT = 1.0  # seconds; another process's `is_locked` never holds the lock for so long


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Within it, no other process can lock the folder; the system unlocks it if this one dies.

    Raises:
        RunLocked: another process is using the folder.
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
    """Returns whether a process is using a run's folder; doesn't block one that wants to."""
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
