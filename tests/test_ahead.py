"""The next step's completions are sampled while a step trains, and are those of one step ago."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.models.adapter import Adapter, add_adapter
from grpo.models.load import LanguageModel
from grpo.training.ahead import DelayedPolicy
from tests.conftest import (
    copy_environment,
    read_lines,
    read_metrics,
    read_summary,
    run_grpo,
    wait_for_step,
)
from tests.rank_cases import MEASURED

SHORT = (
    "tracking=none", "device=cpu", "device.precision=fp32", "batch_size=8", "num_generation=4",
    "max_new_tokens=28", "eval.every=2", "eval.samples=1", "dataset.eval_slice=:4", "max_steps=4",
    "doctor=none", "hydra.run.dir=run",
)  # fmt: skip
AHEAD = "rollout.ahead=1"


def train(folder: Path, *overrides: str) -> Path:
    folder.mkdir(exist_ok=True)
    done = run_grpo(*SHORT, *overrides, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def read_completions(run: Path, step: int) -> list[str]:
    lines = read_lines(run / "completions.jsonl")
    return [line["completion"] for line in lines if line["step"] == step]


def read_own_metrics(run: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if not name.startswith(MEASURED)}
        for line in read_metrics(run)
    ]


def test_completions_come_from_the_policy_of_one_step_ago(tmp_path: Path) -> None:
    usual, ahead = train(tmp_path / "usual"), train(tmp_path / "ahead", AHEAD)
    still = train(tmp_path / "still", "learning_rate=1e-12")
    # The first two steps sample from the initial weights, the third from those after one update.
    for step in (1, 2):
        assert read_completions(ahead, step) == read_completions(still, step)
    assert read_completions(ahead, 3) != read_completions(still, 3)
    assert read_completions(usual, 2) != read_completions(still, 2)
    first, *later = [line["sampler/kl"] for line in read_metrics(ahead)[1:]]
    assert first < 1e-6 < 1e-5 < min(later)
    assert all(line["sampler/kl"] < 1e-6 for line in read_metrics(usual)[1:])


def test_weights_that_stay_make_no_difference(tmp_path: Path) -> None:
    still = ("learning_rate=1e-12", "kl_weight=0.1")
    usual, ahead = train(tmp_path / "usual", *still), train(tmp_path / "ahead", *still, AHEAD)
    for expected, found in zip(read_own_metrics(usual), read_own_metrics(ahead), strict=True):
        for line in (expected, found):  # whether weights move at all is a matter of rounding here
            line.pop("optim/moved", None)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_frozen_weights_are_shared(tiny: LanguageModel) -> None:
    adapter = Adapter(2, 4.0, "all-linear", rslora=False, dora=False, quantized=False)
    tiny.model.requires_grad_(False)
    add_adapter(tiny.model, adapter, seed=0)
    delayed = DelayedPolicy(tiny)
    weights = dict(tiny.model.named_parameters())
    copied = dict(delayed.model.model.named_parameters())
    assert weights.keys() == copied.keys()
    shared = {name for name in weights if weights[name].data_ptr() == copied[name].data_ptr()}
    assert shared == {name for name, weight in weights.items() if not weight.requires_grad}
    assert delayed.state().keys() == weights.keys() - shared
    with torch.no_grad():
        for weight in weights.values():
            if weight.requires_grad:
                weight.add_(1.0)
    before = {name: weight.clone() for name, weight in delayed.state().items()}
    delayed.follow_policy()
    assert all(torch.equal(delayed.state()[n], before[n] + 1.0) for n in before)
    delayed.load_state(before)
    assert delayed.is_behind
    assert all(torch.equal(delayed.state()[n], before[n]) for n in before)


OWN_REWARD = """
import os, threading

calls = 0

def check(samples):
    global calls
    calls += 1
    assert not busy.locked()  # one thread at a time
    with busy:
        if calls == int(os.environ.get("FAIL_AT", 0)):
            raise ValueError("no good")
        return [float(len(sample.completion) % 3) for sample in samples]

busy = threading.Lock()
"""
OWN = ("+reward.own._target_=own_reward.check", "checkpoint.every=0")


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("adapter=lora", "device.precision=bf16")], ids=str)
def test_a_killed_run_resumes_with_the_same_numbers(
    overrides: tuple[str, ...], tmp_path: Path
) -> None:
    overrides = (AHEAD, "max_steps=6", "checkpoint.every=1", *overrides)
    whole = train(tmp_path / "whole", *overrides)
    command = [sys.executable, "-m", "grpo", *SHORT, *overrides]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=copy_environment(), stderr=subprocess.PIPE
    )
    wait_for_step(tmp_path / "run", 3, process)
    process.kill()
    process.communicate()
    assert len(read_metrics(tmp_path / "run")) < 7
    done = run_grpo("resume=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_own_metrics(tmp_path / "run") == read_own_metrics(whole)


@pytest.mark.slow
@pytest.mark.parametrize("calls", [4, 5])  # evaluations before it: two; then steps 1 to 3
def test_a_reward_that_fails_ahead_ends_its_own_step(calls: int, tmp_path: Path) -> None:
    for name in ("whole", "failed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own_reward.py").write_text(OWN_REWARD)
    whole = train(tmp_path / "whole", AHEAD, *OWN)
    failed = tmp_path / "failed"
    done = run_grpo(*SHORT, AHEAD, *OWN, cwd=failed, env={"FAIL_AT": str(calls)})
    assert done.returncode == 1
    assert f"grpo: step {calls - 2}: reward.own: it raised ValueError: no good" in done.stderr
    assert read_summary(failed / "run")["status"] == "failed"
    done = run_grpo("resume=run", "--trust", cwd=failed)
    assert done.returncode == 0, done.stderr
    assert read_own_metrics(failed / "run") == read_own_metrics(whole)


OWN_RATIO = """
import os
from grpo.errors import RunError
from grpo.objective.ratios import token_ratio

calls = 0

def fail_once(*inputs):
    global calls
    calls += 1
    if calls == int(os.environ.get("FAIL_AT", 0)):
        raise RunError("no memory at all")
    return token_ratio(*inputs)
"""


@pytest.mark.slow
def test_an_update_that_fails_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    own = (AHEAD, "checkpoint.every=1", "algorithm.ratio=own_ratio.fail_once")
    for name in ("whole", "failed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own_ratio.py").write_text(OWN_RATIO)
    whole, failed = train(tmp_path / "whole", *own), tmp_path / "failed"
    done = run_grpo(*SHORT, *own, cwd=failed, env={"FAIL_AT": "3"})
    assert done.returncode == 1, done.stderr
    assert "grpo: step 3: no memory at all" in done.stderr
    assert "step 2 is not saved: its next completions" in done.stderr
    done = run_grpo("resume=run", "--trust", cwd=failed)
    assert done.returncode == 0, done.stderr
    assert read_own_metrics(failed / "run") == read_own_metrics(whole)


@pytest.mark.slow
def test_without_it_a_run_goes_on_from_the_newest_weights(tmp_path: Path) -> None:
    train(tmp_path, AHEAD, "max_steps=2")
    for overrides in (("rollout.ahead=0", "max_steps=3"), (AHEAD, "max_steps=4")):
        done = run_grpo("resume=run", *overrides, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert len(read_metrics(tmp_path / "run")) == 5


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("rollout.ahead=2",), "rollout.ahead=2: use 0 or 1."),
        ((AHEAD, "parallel=ddp", "parallel.processes=2"), "rollout.ahead=1: parallel=ddp samples"),
        ((AHEAD, "rollout=vllm"), "rollout.ahead"),
        ((AHEAD, "rollout=hf"), "rollout.ahead"),
    ],
)
def test_what_can_not_be_sampled_ahead_is_refused(
    overrides: tuple[str, ...], said: str, grpo
) -> None:
    code, printed = grpo(*overrides)
    assert code == 2
    assert said in printed
