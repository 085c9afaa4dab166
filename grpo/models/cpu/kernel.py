"""Decoding's main operations, compiled for this processor from kernel.c if there is a C compiler.

The speed of products with few rows depends on how fast weights are read, and that of one token's
attention on how fast keys are; no operation of torch reads them at the speed of memory. Without a
compiler, torch computes the same numbers more slowly (see docs/performance.md). Only on a CPU, in
fp32 and, with products of bf16 factors, on processors that have instructions for them.
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
INCLUDED_SOURCE = Path(__file__).with_name("kernel_bf16.h")
COMPILER_FLAGS = (
    "-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp",
    "-fPIC", "-shared",
)  # fmt: skip
MAX_LANES = 16  # a head's width must be a multiple of it
NO_WINDOW = 2**62  # a window that is longer than every text

P, N, X, C = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
KERNEL_SIGNATURES = {
    "product": (P, P, N, P, P, N, N, N, N, C),
    "product_bf16": (P, P, P, P, N, N, N, N, C),
    "accumulate_bf16": (P, P, N, P, N, P, N, N, N, C),
    "pack_bf16": (P, P, C, N, N, N, C),
    "norm": (P, P, P, N, N, X, C),
    "gate": (P, P, N, N, C),
    "attend": (P, P, N, P, P, N, P, P, P, P, P, P, P, N, N, N, N, N, N, N, N, X, C),
}


@cache
def load_kernel() -> Any:
    """Returns the library compiled from kernel.c; None if it can't be compiled.

    The library is compiled once on a machine.
    """
    if os.name != "posix":
        return None
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    try:
        library = ctypes.CDLL(str(compile_kernel(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        log.info("rollout=native continues without compiled code: %s", reason.strip())
        return None
    library.wide.restype = N
    library.has_bf16.restype = C
    for name, arguments in KERNEL_SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def has_bf16_kernel() -> bool:
    """Returns whether there is a kernel, and it has products of bf16 factors."""
    return load_kernel() is not None and bool(load_kernel().has_bf16())


def compile_kernel(compiler: str) -> Path:
    """Returns the library's file in the user's cache, compiled if it is not there.

    Raises:
        OSError, subprocess.SubprocessError: it could not be compiled.
    """
    # The name depends on the processor: a home folder may be shared by machines with different
    # ones, which may not be able to run this one's instructions.
    name_parts = [
        KERNEL_SOURCE.read_text(),
        INCLUDED_SOURCE.read_text(),
        compiler,
        *COMPILER_FLAGS,
        platform.machine(),
        read_cpu_flags(),
    ]
    name = hashlib.sha256("\0".join(name_parts).encode()).hexdigest()[:16]
    target = get_cache_folder() / f"kernel-{name}.so"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        library = Path(scratch) / target.name
        command = [compiler, *COMPILER_FLAGS, "-o", str(library), str(KERNEL_SOURCE)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        library.replace(target)  # atomic, because another process may read it
    return target


def read_cpu_flags() -> str:
    """Returns the processor's instruction sets, as Linux lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def make_rows_contiguous(x: Tensor) -> Tensor:
    """Returns x [N, ...], copied if the numbers of a row are not contiguous."""
    return x if x[0].is_contiguous() else x.contiguous()


class PackedWeight:
    """A copy of a weight [O, I] in the layout that the kernel reads; see `can_pack`."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        """Packs the weight in fp32."""
        laid_out = weight_OI.unflatten(0, (-1, load_kernel().wide())).transpose(1, 2)
        self.weight, self.bias_O = laid_out.contiguous(), bias_O
        self.outputs, self.inputs = weight_OI.shape

    @staticmethod
    def can_pack(weight_OI: Tensor) -> bool:
        """Returns whether there is a kernel, and O is a multiple of its block of outputs."""
        return load_kernel() is not None and len(weight_OI) % load_kernel().wide() == 0

    def __call__(self, x: Tensor, total: Tensor | None = None) -> Tensor:
        """Returns total + x · weightᵀ + bias, [..., O], in fp32."""
        x_TI = self._prepare_input(x.reshape(-1, self.inputs))
        start, start_stride = self.bias_O, 0
        if total is not None:
            start = make_rows_contiguous(total.reshape(-1, self.outputs))
            start = start if self.bias_O is None else start + self.bias_O
            start_stride = start.stride(0)
        y_TO = torch.empty(len(x_TI), self.outputs)
        self._multiply(y_TO, x_TI, None if start is None else start.data_ptr(), start_stride)
        return y_TO.view(*x.shape[:-1], self.outputs)

    def _prepare_input(self, x_TI: Tensor) -> Tensor:
        return make_rows_contiguous(x_TI)

    def _multiply(self, y_TO: Tensor, x_TI: Tensor, start: int | None, start_stride: int) -> None:
        load_kernel().product(
            y_TO.data_ptr(), x_TI.data_ptr(), x_TI.stride(0), self.weight.data_ptr(),
            start, start_stride, len(x_TI), self.inputs, self.outputs, torch.get_num_threads(),
        )  # fmt: skip


class PackedWeightBF16(PackedWeight):
    """The same in bf16: factors are rounded to bf16, and sums are in fp32."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        """Packs a weight in fp32 or bf16 as bf16."""
        self.outputs, self.inputs = weight_OI.shape
        weight_OI = make_rows_contiguous(weight_OI)
        self.weight = torch.empty(weight_OI.shape, dtype=torch.bfloat16)
        self.bias_O = None if bias_O is None else bias_O.float()
        load_kernel().pack_bf16(
            self.weight.data_ptr(), weight_OI.data_ptr(), weight_OI.dtype == torch.float32,
            weight_OI.stride(0), self.inputs, self.outputs, torch.get_num_threads(),
        )  # fmt: skip

    @staticmethod
    def can_pack(weight_OI: Tensor) -> bool:
        """Returns whether the kernel multiplies bf16, and the shape fits its blocks and pairs."""
        return (
            has_bf16_kernel()
            and len(weight_OI) % load_kernel().wide() == 0
            and weight_OI.shape[1] % 2 == 0
        )

    def _prepare_input(self, x_TI: Tensor) -> Tensor:
        return x_TI.to(torch.bfloat16).contiguous()

    def _multiply(self, y_TO: Tensor, x_TI: Tensor, start: int | None, start_stride: int) -> None:
        load_kernel().product_bf16(
            y_TO.data_ptr(), x_TI.data_ptr(), self.weight.data_ptr(), start, start_stride,
            len(x_TI), self.inputs, self.outputs, torch.get_num_threads(),
        )  # fmt: skip


TOKENS_AT_ONCE = 512  # as in kernel.c


def can_accumulate_bf16(gradient_OI: Tensor) -> bool:
    """Returns whether the kernel multiplies bf16, and a gradient in fp32 fits its blocks."""
    return (
        has_bf16_kernel()
        and gradient_OI.dtype == torch.float32
        and gradient_OI.is_contiguous()
        and all(size % load_kernel().wide() == 0 for size in gradient_OI.shape)
    )


def accumulate_product_bf16(gradient_OI: Tensor, a_TO: Tensor, b_TI: Tensor) -> None:
    """Adds aᵀ · b, from factors in bf16, to a gradient in fp32; see `can_accumulate_bf16`."""
    a_TO, b_TI = make_rows_contiguous(a_TO), make_rows_contiguous(b_TI)
    outputs, inputs = gradient_OI.shape
    scratch = torch.empty((outputs + inputs) * TOKENS_AT_ONCE, dtype=torch.bfloat16)
    load_kernel().accumulate_bf16(
        gradient_OI.data_ptr(), a_TO.data_ptr(), a_TO.stride(0), b_TI.data_ptr(), b_TI.stride(0),
        scratch.data_ptr(), len(a_TO), outputs, inputs, torch.get_num_threads(),
    )  # fmt: skip


def rms_norm_compiled(x_TD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """Returns x / rms(x) · weight, [T, D] (1910.07467)."""
    x_TD = x_TD.contiguous()
    y_TD = torch.empty_like(x_TD)
    load_kernel().norm(
        y_TD.data_ptr(), x_TD.data_ptr(), weight_D.data_ptr(), *x_TD.shape, epsilon,
        torch.get_num_threads(),
    )  # fmt: skip
    return y_TD


def swiglu_compiled(gate_up: Tensor) -> Tensor:
    """Returns silu(gate) · up, [T, F], from gate and up side by side in [T, 2F] (2002.05202)."""
    count, width = gate_up.shape[0], gate_up.shape[1] // 2
    y_TF, gate_up = gate_up.new_empty(count, width), gate_up.contiguous()
    load_kernel().gate(y_TF.data_ptr(), gate_up.data_ptr(), count, width, torch.get_num_threads())
    return y_TF


class KeyValueBuffers(NamedTuple):
    """Keys and values of prompts and completions; shape letters as in `rollout/cache.py`."""

    prompt_keys: Tensor  # [B, K, P, d], contiguous
    prompt_values: Tensor
    keys: Tensor  # [N, K, C, d], contiguous
    values: Tensor
    prompt_N: Tensor  # int64, the prompt of each row
    lengths_B: Tensor  # int64

    def attend(
        self, query_NHd: Tensor, key_NKd: Tensor, value_NKd: Tensor,
        num_written: int, scale: float, window: int | None,
    ) -> Tensor:  # fmt: skip
        """Stores the key and value of a new token of each row, and returns its attention [N, H, d].

        Args:
            num_written: how many tokens each row has before the new one.
            window: a token attends to the last `window` tokens, itself included.
        """
        query_NHd, key_NKd, value_NKd = map(make_rows_contiguous, (query_NHd, key_NKd, value_NKd))
        if key_NKd.stride(0) != value_NKd.stride(0):
            key_NKd, value_NKd = key_NKd.contiguous(), value_NKd.contiguous()
        count, heads, width = query_NHd.shape
        kv_heads, prompt_longest = self.prompt_keys.shape[1:3]
        repeats, longest, threads = heads // kv_heads, self.keys.shape[2], torch.get_num_threads()
        scratch = query_NHd.new_empty(threads, repeats, prompt_longest + longest + MAX_LANES)
        out_NHd = query_NHd.new_empty(count, heads, width)
        load_kernel().attend(
            out_NHd.data_ptr(), query_NHd.data_ptr(), query_NHd.stride(0),
            key_NKd.data_ptr(), value_NKd.data_ptr(), key_NKd.stride(0),
            self.keys.data_ptr(), self.values.data_ptr(),
            self.prompt_keys.data_ptr(), self.prompt_values.data_ptr(),
            self.prompt_N.data_ptr(), self.lengths_B.data_ptr(), scratch.data_ptr(),
            count, kv_heads, repeats, width, longest, prompt_longest, num_written,
            window or NO_WINDOW, scale, threads,
        )  # fmt: skip
        return out_NHd
