"""One GPU per job: each of the processes that run at the same time locks a GPU and keeps it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

from grpo.errors import ConfigError

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


def take_gpu(sweep: Path) -> str | None:
    """Lets this process see one GPU that no other job of the sweep on this machine uses.

    Must be called before anything uses CUDA. The system frees the GPU when the process ends. With
    one GPU or none it does nothing.

    Returns:
        The GPU's name in `CUDA_VISIBLE_DEVICES`; None with one GPU or none.

    Raises:
        ConfigError: more jobs run at once than there are GPUs.
    """
    devices = list_gpus()
    return lock_gpu(sweep.absolute(), tuple(devices)) if len(devices) > 1 else None


@cache  # a process that runs one job after the other keeps its GPU
def lock_gpu(sweep: Path, devices: tuple[str, ...]) -> str:
    slots = sweep / ".gpus"
    slots.mkdir(parents=True, exist_ok=True)
    for device in devices:
        descriptor = os.open(slots / f"{os.uname().nodename}-{device}", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        os.environ[VISIBLE_DEVICES] = device  # the descriptor stays open, and with it the lock
        return device
    raise ConfigError(
        f"hydra.launcher.n_jobs: more jobs at once than there are GPUs ({len(devices)}); lower it.",
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
