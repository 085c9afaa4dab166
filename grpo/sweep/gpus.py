"""GPUs for each job: those that run at the same time lock their GPUs and keep them."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

from grpo.errors import ConfigError

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


def take_gpus(sweep: Path, count: int | None = 1) -> str | None:
    """Lets this process see GPUs that no other job of the sweep on this machine uses.

    Must be called before anything uses CUDA. The system frees the GPUs when the process ends. With
    one GPU or none it does nothing.

    Args:
        count: how many a job needs; None takes all.

    Returns:
        The GPUs as in `CUDA_VISIBLE_DEVICES`; None with one GPU or none.

    Raises:
        ConfigError: the jobs that run at once need more than there are.
    """
    devices = list_gpus()
    if len(devices) <= 1:
        return None
    return lock_gpus(sweep.absolute(), tuple(devices), len(devices) if count is None else count)


@cache  # a process that runs one job after the other keeps its GPUs
def lock_gpus(sweep: Path, devices: tuple[str, ...], count: int) -> str:
    slots = sweep / ".gpus"
    slots.mkdir(parents=True, exist_ok=True)
    locked: dict[str, int] = {}
    for device in devices:
        descriptor = os.open(slots / f"{os.uname().nodename}-{device}", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        locked[device] = descriptor  # stays open, and with it the lock
        if len(locked) == count:
            os.environ[VISIBLE_DEVICES] = ",".join(locked)
            return os.environ[VISIBLE_DEVICES]
    for descriptor in locked.values():
        os.close(descriptor)
    each = "" if count == 1 else f", {count} each"
    raise ConfigError(
        f"hydra.launcher.n_jobs: more jobs at once{each} than there are GPUs ({len(devices)}); "
        f"lower it.",
        key="hydra.launcher.n_jobs",
    )


def list_gpus() -> list[str]:
    """Returns the names of the GPUs that this process may use."""
    visible = os.environ.get(VISIBLE_DEVICES)
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True
    )
    return listed.stdout.split() if listed.returncode == 0 else []
