"""Where the tensors live and in what precision they are computed."""

from __future__ import annotations

import os
import re
import resource
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from grpo.errors import ConfigError

PROC = Path("/proc/self")  # Linux


@dataclass(frozen=True)
class Device:
    """A device and its dtype policy: weights are fp32, products bf16 where the hardware has it."""

    torch_device: torch.device
    autocast_dtype: torch.dtype | None

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of every forward pass: rollout, reference and update alike."""
        return torch.autocast(
            self.torch_device.type,
            dtype=self.autocast_dtype or torch.bfloat16,
            enabled=self.autocast_dtype is not None,
        )

    def measure_peak_gb(self) -> float:
        """The most memory held so far, in GB: of the GPU, or of the whole process on a CPU."""
        if self.torch_device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.torch_device) / 1e9
        if self.torch_device.type == "mps":
            return torch.mps.driver_allocated_memory() / 1e9
        if PROC.is_dir():
            peak = re.search(r"VmHWM:\s+(\d+) kB", (PROC / "status").read_text())
            return int(peak[1]) * 1024 / 1e9 if peak else 0.0
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

    def synchronize(self) -> None:
        """Waits for the device, so that a clock read afterwards tells the truth."""
        if self.torch_device.type == "cuda":
            torch.cuda.synchronize(self.torch_device)
        elif self.torch_device.type == "mps":
            torch.mps.synchronize()

    def describe(self) -> str:
        kind = self.torch_device.type
        name = torch.cuda.get_device_name(self.torch_device) if kind == "cuda" else kind
        precision = str(self.autocast_dtype or torch.float32).removeprefix("torch.")
        threads = torch.get_num_threads()
        return f"{name}, {threads} thread{'' if threads == 1 else 's'}, {precision}"


def reset_peak_memory(kind: str) -> None:
    """Starts the peak of memory anew, so that a sweep's second job doesn't report the first's."""
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif os.access(PROC / "clear_refs", os.W_OK):
        (PROC / "clear_refs").write_text("5")


def open_device(kind: str, precision: str) -> Device:
    """The device asked for, or `auto`: the best there is.

    Args:
        kind: auto, cpu, cuda or mps.
        precision: auto (bf16 where the hardware computes it fast), bf16 or fp32.

    Raises:
        ConfigError: the device is not there.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if kind == "auto":
        kind = next(name for name, there in present.items() if there)
    if not present[kind]:
        choices = ", ".join(name for name, there in present.items() if there)
        raise ConfigError(
            f"device={kind}: this machine has none; use device={choices} or auto.",
            key="device",
            value=kind,
        )
    if precision == "auto":
        precision = "bf16" if kind == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    reset_peak_memory(kind)
    return Device(
        torch_device=torch.device(kind),
        autocast_dtype=torch.bfloat16 if precision == "bf16" else None,
    )
