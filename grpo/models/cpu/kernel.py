"""What decoding does most, compiled for this processor where a C compiler is there: kernel.c.

Products of few rows are bound by how weights are read, and the attention of one token by how keys
are; no operation of torch reads either at the speed of memory. Without a compiler the same numbers
come from torch's, slower; docs/performance.md says by how much. In fp32 on a CPU alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo.models.cache import get_cache_folder

log = logging.getLogger(__name__)

KERNEL_SOURCE = Path(__file__).with_name("kernel.c")
COMPILER_FLAGS = (
    "-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp",
    "-fPIC", "-shared",
)  # fmt: skip
MAX_LANES = 16  # a head's width is a multiple of it
NO_WINDOW = 2**62  # a window that hides nothing

P, N, X, C = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
KERNEL_SIGNATURES = {
    "product": (P, P, N, P, P, N, N, N, N, C),
    "norm": (P, P, P, N, N, X, C),
    "gate": (P, P, N, N, C),
    "attend": (P, P, N, P, P, N, P, P, P, P, P, P, P, N, N, N, N, N, N, N, N, X, C),
}


@cache
def load_kernel() -> Any:
    """The library made of kernel.c; None where it can't be compiled. Compiled once a machine."""
    if os.name != "posix":
        return None
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    try:
        library = ctypes.CDLL(str(compile_kernel(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        log.info("rollout=native goes on without compiled code: %s", said.strip())
        return None
    library.wide.restype = N
    for name, arguments in KERNEL_SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def compile_kernel(compiler: str) -> Path:
    """The library's file in the user's cache.

    Raises:
        OSError, subprocess.SubprocessError: it could not be made.
    """
    # A home may be shared by machines with other processors, on which this one's code is illegal.
    made_of = [
        KERNEL_SOURCE.read_text(),
        compiler,
        *COMPILER_FLAGS,
        platform.machine(),
        read_cpu_flags(),
    ]
    name = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    target = get_cache_folder() / f"kernel-{name}.so"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        command = [compiler, *COMPILER_FLAGS, "-o", str(made), str(KERNEL_SOURCE)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        made.replace(target)  # at once: another process may be waiting for it
    return target


def read_cpu_flags() -> str:
    """What its processor can do, as Linux says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def make_rows_contiguous(x: Tensor) -> Tensor:
    """[N, ...] the same, each row's numbers one behind the other."""
    return x if x[0].is_contiguous() else x.contiguous()


class PackedWeight:
    """A weight [O, I] as the kernel reads it, copied; `fits` says which ones it can."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        laid_out = weight_OI.unflatten(0, (-1, load_kernel().wide())).transpose(1, 2)
        self.weight, self.bias_O = laid_out.contiguous(), bias_O
        self.outputs, self.inputs = weight_OI.shape

    @staticmethod
    def can_pack(weight_OI: Tensor) -> bool:
        return load_kernel() is not None and len(weight_OI) % load_kernel().wide() == 0

    def __call__(self, x: Tensor, total: Tensor | None = None) -> Tensor:
        """[..., O] total + x · weightᵀ + bias."""
        x_TI = make_rows_contiguous(x.reshape(-1, self.inputs))
        start, apart = self.bias_O, 0
        if total is not None:
            start = make_rows_contiguous(total.reshape(-1, self.outputs))
            start = start if self.bias_O is None else start + self.bias_O
            apart = start.stride(0)
        y_TO = x.new_empty(len(x_TI), self.outputs)
        load_kernel().product(
            y_TO.data_ptr(), x_TI.data_ptr(), x_TI.stride(0), self.weight.data_ptr(),
            None if start is None else start.data_ptr(), apart,
            len(x_TI), self.inputs, self.outputs, torch.get_num_threads(),
        )  # fmt: skip
        return y_TO.view(*x.shape[:-1], self.outputs)


def rms_norm_compiled(x_TD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """[T, D] x / rms(x) · weight (1910.07467)."""
    x_TD = x_TD.contiguous()
    y_TD = torch.empty_like(x_TD)
    load_kernel().norm(
        y_TD.data_ptr(), x_TD.data_ptr(), weight_D.data_ptr(), *x_TD.shape, epsilon,
        torch.get_num_threads(),
    )  # fmt: skip
    return y_TD


def swiglu_compiled(gate_up: Tensor) -> Tensor:
    """[T, F] silu(gate) · up (2002.05202), which stand side by side in [T, 2F]."""
    count, width = gate_up.shape[0], gate_up.shape[1] // 2
    y_TF, gate_up = gate_up.new_empty(count, width), gate_up.contiguous()
    load_kernel().gate(y_TF.data_ptr(), gate_up.data_ptr(), count, width, torch.get_num_threads())
    return y_TF


class KeyValueBuffers(NamedTuple):
    """Where keys and values are, and are written to; shape letters as in `rollout/cache.py`."""

    prompt_keys: Tensor  # [B, K, P, d], contiguous
    prompt_values: Tensor
    keys: Tensor  # [N, K, C, d], contiguous
    values: Tensor
    prompt_N: Tensor  # int64, the prompt of each row
    lengths_B: Tensor  # int64

    def attend(
        self, asked_NHd: Tensor, key_NKd: Tensor, value_NKd: Tensor,
        num_written: int, scale: float, window: int | None,
    ) -> Tensor:  # fmt: skip
        """[N, H, d] for one more token of each row, whose key and value become the next ones.

        Args:
            written: how many of its own a row has already.
            window: a token sees this many, itself among them.
        """
        asked_NHd, key_NKd, value_NKd = map(make_rows_contiguous, (asked_NHd, key_NKd, value_NKd))
        if key_NKd.stride(0) != value_NKd.stride(0):
            key_NKd, value_NKd = key_NKd.contiguous(), value_NKd.contiguous()
        count, heads, width = asked_NHd.shape
        kv_heads, prompt_longest = self.prompt_keys.shape[1:3]
        repeats, longest, threads = heads // kv_heads, self.keys.shape[2], torch.get_num_threads()
        scratch = asked_NHd.new_empty(threads, repeats, prompt_longest + longest + MAX_LANES)
        out_NHd = asked_NHd.new_empty(count, heads, width)
        load_kernel().attend(
            out_NHd.data_ptr(), asked_NHd.data_ptr(), asked_NHd.stride(0),
            key_NKd.data_ptr(), value_NKd.data_ptr(), key_NKd.stride(0),
            self.keys.data_ptr(), self.values.data_ptr(),
            self.prompt_keys.data_ptr(), self.prompt_values.data_ptr(),
            self.prompt_N.data_ptr(), self.lengths_B.data_ptr(), scratch.data_ptr(),
            count, kv_heads, repeats, width, longest, prompt_longest, num_written,
            window or NO_WINDOW, scale, threads,
        )  # fmt: skip
        return out_NHd
