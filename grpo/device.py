"""The device that holds the tensors, and the precision that it computes in."""

from __future__ import annotations

import os
import re
import resource
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from grpo.errors import ConfigError

PROC = Path("/proc/self")  # exists on Linux only


@dataclass(frozen=True)
class Device:
    """A device and its precision: weights are fp32, matrix products autocast_dtype if it is set."""

    torch_device: torch.device
    autocast_dtype: torch.dtype | None

    @property
    def has_fast_bf16(self) -> bool:
        """Whether bf16 products are computed by this project's own code, on a CPU made for them.

        It rounds a weight at each use; autocast keeps a rounded copy for a whole forward pass.
        """
        is_bf16 = self.autocast_dtype == torch.bfloat16
        return is_bf16 and self.torch_device.type == "cpu" and multiplies_bf16()

    def autocast(self) -> AbstractContextManager[object]:
        """Returns a context with the precision of all forward passes, rollout and reference too."""
        return torch.autocast(
            self.torch_device.type,
            dtype=self.autocast_dtype or torch.bfloat16,
            enabled=self.autocast_dtype is not None,
        )

    def measure_peak_gb(self) -> float:
        """Returns the peak memory so far, in GB: of the GPU, or of the whole process on a CPU.

        On Apple's MPS, which records no peak, it is the memory that is held now.
        """
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
        """Waits until the device is idle, so that a clock read afterwards includes its work."""
        if self.torch_device.type == "cuda":
            torch.cuda.synchronize(self.torch_device)
        elif self.torch_device.type == "mps":
            torch.mps.synchronize()

    def describe(self) -> str:
        """Returns the device's name, the number of CPU threads and the precision, in words."""
        kind = self.torch_device.type
        name = torch.cuda.get_device_name(self.torch_device) if kind == "cuda" else kind
        precision = str(self.autocast_dtype or torch.float32).removeprefix("torch.")
        threads = torch.get_num_threads()
        return f"{name}, {threads} thread{'' if threads == 1 else 's'}, {precision}"


@cache
def multiplies_bf16() -> bool:
    """Returns whether the CPU has instructions for products in bf16 (AVX512-BF16 or AMX).

    With them such products are about twice as fast as in fp32; without them they are slower.
    """
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def reset_peak_memory(kind: str) -> None:
    """Resets the peak, so that a later job of a sweep doesn't report that of an earlier one."""
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif os.access(PROC / "clear_refs", os.W_OK):
        (PROC / "clear_refs").write_text("5")


def open_device(kind: str, precision: str, index: int = 0) -> Device:
    """Returns the device of this kind and resets its peak memory.

    Args:
        kind: cpu, cuda or mps; auto takes the first of cuda, mps and cpu that is available.
        index: of the GPU, among those that this process sees.
        precision: bf16 or fp32; auto is bf16 where the device has instructions for it, else fp32.

    Raises:
        ConfigError: this machine doesn't have the device.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if kind == "auto":
        kind = next(name for name, is_available in available.items() if is_available)
    if not available[kind]:
        choices = ", ".join(name for name, is_available in available.items() if is_available)
        raise ConfigError(
            f"device={kind}: this machine has none; use device={choices} or auto.",
            key="device",
            value=kind,
        )
    if precision == "auto":
        on_gpu = kind == "cuda" and torch.cuda.is_bf16_supported()
        precision = "bf16" if on_gpu or (kind == "cpu" and multiplies_bf16()) else "fp32"
    if kind == "cuda":
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"parallel.processes: more than this machine's {torch.cuda.device_count()} GPUs; "
                f"each process needs its own.",
                key="parallel.processes",
            )
        torch.cuda.set_device(index)
    reset_peak_memory(kind)
    return Device(
        torch_device=torch.device(kind, index) if kind == "cuda" else torch.device(kind),
        autocast_dtype=torch.bfloat16 if precision == "bf16" else None,
    )
