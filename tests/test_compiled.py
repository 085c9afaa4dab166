"""Tests that compiled code gives torch's numbers, and that torch replaces it without compiler."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from grpo.models.cache import get_cache_folder
from grpo.models.cpu import kernel
from grpo.models.cpu.kernel import (
    KeyValueBuffers,
    PackedWeight,
    PackedWeightBF16,
    rms_norm_compiled,
    swiglu_compiled,
)

needs_bf16 = pytest.mark.skipif(
    not kernel.has_bf16_kernel(),
    reason="there is no compiler, or the processor has no instructions for bf16",
)
needs_compiler = pytest.mark.skipif(kernel.load_kernel() is None, reason="no C compiler is there")


@needs_compiler
@pytest.mark.parametrize("rows", range(1, 27))  # includes remainders of a tile of all sizes
@settings(max_examples=8)
@given(
    inputs=st.integers(1, 70), columns=st.integers(1, 4), biased=st.booleans(), added=st.booleans()
)
def test_a_product_is_torchs(
    rows: int, inputs: int, columns: int, biased: bool, added: bool
) -> None:
    generator = torch.Generator().manual_seed(inputs)
    weight = torch.randn(32 * columns, inputs, generator=generator)
    bias = torch.randn(32 * columns, generator=generator) if biased else None
    total = torch.randn(rows, 32 * columns, generator=generator) if added else None
    x = torch.randn(rows, inputs + 3, generator=generator)[:, 3:]  # rows with gaps between them
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    expected = expected if total is None else total + expected
    assert_close(PackedWeight(weight, bias)(x, total).double(), expected, atol=1e-5, rtol=1e-5)


@needs_bf16
@pytest.mark.parametrize("rows", range(1, 27))
@settings(max_examples=8)
@given(
    pairs=st.integers(1, 35), columns=st.integers(1, 4), biased=st.booleans(), added=st.booleans(),
    stored=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_a_product_in_bf16_rounds_its_factors_only(
    rows: int, pairs: int, columns: int, biased: bool, added: bool, stored: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(pairs)
    weight = torch.randn(32 * columns, 2 * pairs, generator=generator).to(stored)
    bias = torch.randn(32 * columns, generator=generator) if biased else None
    total = torch.randn(rows, 32 * columns, generator=generator) if added else None
    x = torch.randn(rows, 2 * pairs + 3, generator=generator)[:, 3:]
    factors = (x.bfloat16().double(), weight.bfloat16().double())
    expected = F.linear(*factors, None if bias is None else bias.double())
    expected = expected if total is None else total + expected
    found = PackedWeightBF16(weight, bias)(x, total)
    assert found.dtype == torch.float32
    assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@needs_bf16
def test_weights_are_rounded_as_torch_rounds_them() -> None:
    """To the nearest, ties to even; infinities and NaN stay what they are."""
    bits = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0))
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.4028235e38, -0.0, 1e-45])
    ties = torch.arange(0x3F808000, 0x3F808000 + 26 * 0x10000, 0x10000)
    numbers = torch.cat([special, *(x.int().view(torch.float32) for x in (bits, ties))])
    numbers = numbers[: len(numbers) // 64 * 64].view(32, -1)
    packed = PackedWeightBF16(numbers, None).weight.flatten()
    expected = numbers.bfloat16().view(32, -1, 2).transpose(0, 1).flatten()
    assert_close(packed, expected, atol=0, rtol=0, equal_nan=True)


@needs_compiler
def test_only_whole_blocks_of_outputs_fit() -> None:
    assert PackedWeight.can_pack(torch.empty(64, 5))
    assert not PackedWeight.can_pack(torch.empty(97, 5))


@needs_compiler
def test_norm_and_gate_are_torchs_also_far_out() -> None:
    x = torch.tensor([1e-4, 1.0, 30.0, 200.0])[:, None] * torch.randn(4, 96)
    weight = torch.randn(96)
    assert_close(rms_norm_compiled(x, weight, 1e-5), F.rms_norm(x, (96,), weight, 1e-5))
    expected = F.silu(x[:, :48]) * x[:, 48:]
    assert_close(swiglu_compiled(x), expected, rtol=1e-5, atol=1e-30)


def compute_attention(
    keys: KeyValueBuffers, queries: Tensor, written: int, scale: float, window: int
) -> Tensor:
    """Computes attention one row and one head at a time, in float64."""
    out = torch.empty_like(queries)
    repeats = queries.shape[1] // keys.keys.shape[1]
    for n in range(queries.shape[0]):
        b = int(keys.prompt_N[n])
        for h in range(queries.shape[1]):
            k = h // repeats
            visible_keys, visible_values = (
                torch.cat([of_prompt[b, k, : keys.lengths_B[b]], of_row[n, k, : written + 1]])
                for of_prompt, of_row in (
                    (keys.prompt_keys, keys.keys), (keys.prompt_values, keys.values)
                )
            )  # fmt: skip
            scores = visible_keys[-window:].double() @ queries[n, h].double() * scale
            out[n, h] = (scores.softmax(0) @ visible_values[-window:].double()).float()
    return out


@needs_compiler
@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (2, 3), (3, 2), (2, 7)]),
    width=st.sampled_from([16, 64, 80, 128]),
    written=st.integers(0, 35),
    window=st.one_of(st.none(), st.integers(1, 50)),
)
def test_attention_is_a_softmax_over_prompt_and_own(
    lengths: list[int],
    rows: list[int],
    heads: tuple[int, int],
    width: int,
    written: int,
    window: int | None,
) -> None:
    generator = torch.Generator().manual_seed(written)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    prompt_N = torch.tensor([row % len(lengths) for row in rows])
    (kv_heads, repeats), longest = heads, max(lengths)
    keys = KeyValueBuffers(
        *(draw(len(lengths), kv_heads, longest, width) for _ in range(2)),
        *(draw(len(rows), kv_heads, 36, width) for _ in range(2)),
        prompt_N,
        torch.tensor(lengths),
    )
    before = [x.clone() for x in (keys.keys, keys.values)]
    together = draw(len(rows), kv_heads * (repeats + 2), width)  # as one product computes them
    queries, key, value = together.split([kv_heads * repeats, kv_heads, kv_heads], dim=1)
    found = keys.attend(queries, key, value, written, 0.3, window)
    for now, old, new in zip((keys.keys, keys.values), before, (key, value), strict=True):
        old[:, :, written] = new
        assert torch.equal(now, old)  # only the new token is written
    expected = compute_attention(keys, queries, written, 0.3, window or 10**6)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Uses an empty cache folder, so that nothing is compiled yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_a_compiler_that_fails_is_said_and_done_without(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = fresh / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'no room left' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    caplog.set_level(logging.INFO)
    assert kernel.load_kernel.__wrapped__() is None
    assert "without compiled code: no room left" in caplog.text
    assert list(get_cache_folder().iterdir()) == []


def test_no_compiler_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert kernel.load_kernel.__wrapped__() is None


@needs_compiler
@pytest.mark.slow
def test_processes_that_compile_at_once_do_not_disturb_each_other(fresh: Path) -> None:
    program = "from grpo.models.cpu.kernel import load_kernel; assert load_kernel().wide() > 0"
    running = [
        subprocess.Popen([sys.executable, "-c", program], env=os.environ.copy()) for _ in range(3)
    ]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert [path.suffix for path in get_cache_folder().iterdir()] == [".so"]
