"""Tests how token limits follow from memory, and how they are halved when it runs out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import grpo.device
from grpo.device import open_device
from grpo.errors import ConfigError, RunError
from grpo.memory import estimate
from grpo.memory.budget import Budget, TokenLimit, is_out_of_memory
from grpo.memory.estimate import (
    HEAP_OVERHEAD_IN_BF16,
    MemoryNeeds,
    Workload,
    choose_budget,
    estimate_memory,
    estimate_token_bytes,
)
from grpo.models.cpu import linear
from grpo.models.load import LanguageModel
from grpo.models.reference import make_reference
from grpo.rollout.vllm import compute_gpu_share

CPU = torch.device("cpu")
HELD = MemoryNeeds(training_gb=1.0, sampling_gb=2.0, token_bytes=1e6, position_bytes=1e5)


def test_tokens_are_what_memory_holds_beside_all_else() -> None:
    """Of 3 GB, libraries take 0.7 and weights 1.0, so 1.3 GB are left at 1 MB a token."""
    budget = choose_budget(CPU, 3.0, None, None, HELD, longest=100)
    assert budget.forward_limit.max_at_once == pytest.approx(1300, abs=1)
    assert budget.forward_limit.tokens == 1024  # more are no faster on a CPU
    assert budget.cache_limit.max_at_once == pytest.approx(3000, abs=1)  # 0.3 GB at 0.1 MB
    little = choose_budget(CPU, 2.0, None, None, HELD, longest=100).forward_limit
    assert little.tokens == little.max_at_once == pytest.approx(300, abs=1)
    assert choose_budget(CPU, 2.0, 5000, None, HELD, longest=100).forward_limit == TokenLimit(
        5000, 5000
    )


def test_less_memory_than_one_completion_takes_is_refused() -> None:
    """1.7 GB are needed without tokens, and 0.1 GB for 100 of them."""
    with pytest.raises(ConfigError, match=r"device.memory_gb=1.75: .* 100 tokens, take 1.8 GB"):
        choose_budget(CPU, 1.75, None, None, HELD, longest=100)
    assert choose_budget(CPU, 1.81, None, None, HELD, longest=100).forward_limit.max_at_once in (
        109,
        110,
    )


WORK = Workload(
    prompt=30, completion=10, group=4, optimizer="adamw", reference=False, reference_moves=False
)


def test_what_a_model_holds_is_counted(tiny: LanguageModel) -> None:
    weights = sum(p.numel() for p in tiny.model.parameters())
    alone = estimate_memory(tiny, WORK)
    beside = estimate_memory(tiny, replace(WORK, reference=True))
    assert beside.training_gb - alone.training_gb == pytest.approx(4e-9 * weights, rel=0.01)
    small = estimate_memory(tiny, replace(WORK, optimizer="adamw_8bit"))
    assert alone.training_gb - small.training_gb == pytest.approx(6e-9 * weights, rel=0.01)
    # Keys and values: 2 x 4 bytes x 4 layers x 3 heads x width 64.
    config = tiny.model.config
    heads = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    by_hand = 2 * 4 * config.num_hidden_layers * heads + 12 * config.vocab_size / 10
    assert alone.position_bytes == by_hand
    tiny.model.requires_grad_(False)
    assert estimate_token_bytes(tiny, WORK) == 0


@pytest.mark.parametrize("fast", [False, True])
def test_the_copies_that_autocast_makes_are_no_tokens(
    fast: bool, tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 keeps no more for a token than fp32; autocast's copies of the weights count once.

    Processors with instructions for bf16 don't use autocast's copies, but one of the head's weight
    in the kernel's layout.
    """
    for module in (grpo.device, linear):
        monkeypatch.setattr(module, "multiplies_bf16", lambda: fast)
    monkeypatch.setattr(estimate, "_token_bytes", {})
    in_bf16 = replace(tiny, device=open_device("cpu", "bf16"))
    assert 0.4 < estimate_token_bytes(in_bf16, WORK) / estimate_token_bytes(tiny, WORK) < 1.5
    config, wide, narrow = (
        tiny.model.config,
        estimate_memory(tiny, WORK),
        estimate_memory(in_bf16, WORK),
    )
    products = sum(
        x.weight.numel() + (0 if x.bias is None else x.bias.numel())
        for x in tiny.model.model.modules()
        if isinstance(x, torch.nn.Linear)
    )
    head = config.vocab_size * config.hidden_size  # a copy that exists while the head is used
    more = 4 * head if fast else 2 * HEAP_OVERHEAD_IN_BF16 * products + 2 * head
    assert (narrow.training_gb - wide.training_gb) * 1e9 == pytest.approx(more, rel=0.01)
    row = 12 * config.vocab_size / 10
    cache = wide.position_bytes - row
    assert narrow.position_bytes - row == (cache if fast else cache / 2)  # attention is in fp32


def test_a_reference_takes_half_where_it_is_computed_in_bf16(tiny: LanguageModel) -> None:
    in_bf16 = replace(tiny, device=open_device("cpu", "bf16"))
    work = replace(WORK, reference=True)
    reference = make_reference(in_bf16, moves=False).model.model
    taken = sum(x.nbytes for x in (*reference.parameters(), *reference.buffers()))
    found = estimate_memory(in_bf16, work).training_gb - estimate_memory(in_bf16, WORK).training_gb
    assert found * 1e9 == pytest.approx(taken, rel=1e-3)
    moving = estimate_memory(in_bf16, replace(work, reference_moves=True))
    assert moving.training_gb > estimate_memory(in_bf16, work).training_gb


def test_it_begins_anew_with_half_of_what_was_too_much(caplog: pytest.LogCaptureFixture) -> None:
    limit, tried, undone = TokenLimit(1000, 9000), [], []

    def work() -> str:
        tokens = min(limit.tokens, 700)
        tried.append(tokens)
        limit.record_start(tokens)
        if tokens > 200:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return "done"

    assert limit.retry_smaller(work, undo=lambda: undone.append(1)) == "done"
    assert tried == [700, 350, 175]
    assert len(undone) == 2
    assert limit == TokenLimit(175, 175, limit.name, 175)
    assert "out of memory with 700" in caplog.text
    assert "at most 350" in caplog.text


def test_what_can_be_no_less_is_an_error_that_says_what_helps() -> None:
    limit = TokenLimit(100, 100)

    def work() -> None:
        limit.record_start(80)  # one completion
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    with pytest.raises(RunError, match=r"with 80 tokens .*gradient_checkpointing"):
        limit.retry_smaller(work)


def test_other_errors_are_not_taken_for_it() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    limit = TokenLimit(100, 100)

    def work() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        limit.retry_smaller(work)
    assert limit.tokens == 100


def test_a_resumed_budget_is_as_it_was_unless_another_is_asked_for() -> None:
    budget = Budget.from_tokens(100, 300)
    budget.forward_limit.record_start(90)
    budget.forward_limit.halve("it said so")
    again, other = Budget.from_tokens(100, 300), Budget.from_tokens(64, 300)
    other.configured = (4.0, None)
    again.load_state(budget.state())
    other.load_state(budget.state())
    assert (
        again.forward_limit.tokens,
        again.forward_limit.max_at_once,
        again.cache_limit.max_at_once,
    ) == (45, 45, 300)
    assert other.forward_limit.tokens == 64


# oneDNN makes code for each shape, and for that needs address space of its own, which freed tensors
# don't give back: it is left out here.
LIMITED = """
import resource, sys
from grpo.cli.main import main
import datasets, torch, transformers, wandb
import grpo.models.cpu.linear
grpo.models.cpu.linear.HAS_ONEDNN = False
megabytes = int(sys.argv.pop(1))
if megabytes:
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20,) * 2)
main()
"""
RUN = (
    "max_steps=1", "batch_size=32", "num_generation=16", "max_new_tokens=64", "temperature=1.5",
    "dataset.eval_slice=:8", "eval.samples=1", "tracking=none", "device=cpu",
    "device.precision=fp32",
    "device.token_budget=100000", "hydra.run.dir=run",
)  # fmt: skip


def run_within(megabytes: int, folder: Path) -> tuple[str, dict[str, float]]:
    """Returns output and metrics of a run limited to so many megabytes beside libraries; 0: all."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(megabytes), *RUN],
        cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    last = (folder / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    return said, json.loads(last)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a process as Linux does")
@pytest.mark.slow
def test_a_run_that_is_out_of_memory_goes_on_with_less(tmp_path: Path) -> None:
    """A run that really ran out of memory twice or more has the numbers of one with enough."""
    roomy, expected = run_within(0, tmp_path / "roomy")
    narrow, found = run_within(600, tmp_path / "narrow")
    assert "out of memory" not in roomy
    assert re.search(r"out of memory with \d+ tokens in .*: from here on at most \d+", narrow)
    assert found["memory/peak_gb"] < expected["memory/peak_gb"]
    for name in ("loss/total", "kl/mean", "optim/grad_norm", "policy/entropy", "reward/mean"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6)


def test_vllm_takes_what_is_free_beside_the_policy() -> None:
    """60 of 80 GB are free: a share of 0.71 is 56.8 GB, of which weights take 3, workspace 2."""
    share, room = compute_gpu_share(60 * 10**9, 80 * 10**9, 3 * 10**9)
    assert share == 0.71
    assert room == pytest.approx(51.8e9)
    assert compute_gpu_share(80 * 10**9, 80 * 10**9, 0)[0] == 0.95
    with pytest.raises(ConfigError, match=r"rollout=vllm: 8.0 GB of the GPU are free .* 6.0 GB"):
        compute_gpu_share(8 * 10**9, 80 * 10**9, 6 * 10**9)
