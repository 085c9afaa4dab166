"""Every key does something: changed alone, it changes what a short run leaves, or is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo.cli.explain import flatten_keys
from tests.test_config import compose

Grpo = Callable[..., tuple[int, str]]
USUAL = (
    "experiment=smoke", "tracking=none", "max_steps=2", "eval.every=1", "checkpoint.every=1",
    "dataset.size=40", "dataset.eval_size=8", "max_new_tokens=24",
)  # fmt: skip
TWO_UPDATES = ("algorithm.minibatches=2", "learning_rate=3e-3")
NO_CLIP = "algorithm.policy_loss.clip_high=0"
MOVING = ("kl.sync_every=1",)

# A value for each key, and what else must be set on both sides for it to matter.
CHANGED: dict[str, tuple[str, tuple[str, ...]]] = {
    "name": ("other", ()),
    "seed": ("1", ()),
    "num_epochs": ("2", ("max_steps=null", "dataset.size=16", "eval.every=0")),
    "max_steps": ("3", ()),
    "batch_size": ("2", ()),
    "num_generation": ("2", ()),
    "max_new_tokens": ("8", ()),
    "temperature": ("0.5", ()),
    "sampling.repetition_penalty": ("1.5", ()),
    "sampling.top_k": ("2", ()),
    "sampling.top_p": ("0.2", ()),
    "sampling.min_p": ("0.9", ()),
    "sampling.stop": ("['1']", ()),
    "kl_weight": ("0.5", ()),
    "learning_rate": ("1e-3", ()),
    "optim.name": ("adamw_8bit", ()),
    "optim.schedule": ("linear", ()),
    "optim.warmup_steps": ("2", ()),
    "optim.weight_decay": ("0.5", ()),
    "optim.betas": ("[0.5,0.9]", ()),
    "optim.max_grad_norm": ("1e-4", ()),
    "curriculum.order": ("given", ()),
    "curriculum.samples": ("2", ("curriculum.order=easy_first",)),
    "curriculum.at_least": ("0.6", ("curriculum.samples=2",)),
    "curriculum.at_most": ("0.4", ("curriculum.samples=2",)),
    "eval.every": ("2", ()),
    "eval.samples": ("3", ()),
    "eval.temperature": ("0.2", ()),
    "eval.greedy": ("false", ()),
    "checkpoint.every": ("2", ()),
    "checkpoint.keep": ("1", ()),
    "log_prompts": ("1", ()),
    "objective": ("eval/accuracy", ()),
    "model.name": ("other", ("name=null",)),
    "model.id": ("nobody/none", ()),
    "model.revision": ("v2", ()),
    "model.trust_remote_code": ("true", ()),
    "model.path": ("nowhere", ()),
    "model.packaged": ("nothing", ()),
    "model.learning_rate": ("1e-3", ()),
    "dataset.digits": ("1", ()),
    "dataset.operations": ("+", ()),
    "dataset.size": ("30", ()),
    "dataset.eval_size": ("6", ()),
    "dataset.seed": ("1", ()),
    "dataset.extract": ("number", ()),
    "dataset.split": ("test", ()),
    "dataset.slice": ("':30'", ()),
    "dataset.eval_split": ("train", ("dataset.allow_overlap=true",)),
    "dataset.eval_slice": ("':4'", ()),
    "dataset.system_prompt": ("Be right.", ()),
    "dataset.worked_examples": ("[{question: 1+1, answer: two}]", ()),
    "dataset.chat": ("false", ()),
    "dataset.template_options": ("{add_generation_prompt: false}", ()),
    "dataset.max_prompt_tokens": ("3", ()),
    "dataset.allow_overlap": ("true", ("dataset.eval_split=train",)),
    "reward.answer.weight": ("0.5", ()),
    "kl.estimator": ("k1", ()),
    "kl.direction": ("forward", ()),
    "kl.within": ("reward", ()),
    "kl.unbiased_gradient": ("true", TWO_UPDATES),
    "kl.target": ("0.01", ()),
    "kl.horizon": ("20", ("kl.target=0.001", "kl_weight=0.5", "learning_rate=3e-3")),
    "kl.sync_every": ("1", ("learning_rate=3e-3",)),
    "kl.sync_share": ("0.5", (*MOVING, "learning_rate=3e-3")),
    "algorithm.kl_weight": ("0.5", ()),
    "algorithm.kl_within": ("reward", ()),
    "algorithm.policy_loss.clip_low": ("0.0", TWO_UPDATES),
    "algorithm.policy_loss.clip_high": ("0.0", TWO_UPDATES),
    "algorithm.policy_loss.clip_dual": ("1.001", (NO_CLIP, *TWO_UPDATES)),
    "algorithm.baseline": ("none", ()),
    "algorithm.scale": ("none", ()),
    "algorithm.aggregate": ("normalize_then_sum", ("reward=[answer,length]",)),
    "algorithm.ratio": ("sequence", TWO_UPDATES),
    "algorithm.averaging": ("token_mean", ()),
    "algorithm.mask_truncated": ("true", ("max_new_tokens=18",)),
    "algorithm.top_entropy": ("0.2", ()),
    "algorithm.importance_cap": ("1.0", ("device.precision=bf16",)),
    "algorithm.importance_floor": ("1.0", ("device.precision=bf16",)),
    "algorithm.importance_outside": (
        "mask", ("device.precision=bf16", "algorithm.importance_cap=1.001")
    ),
    "algorithm.importance_level": ("sequence_product", ("device.precision=bf16",)),
    "algorithm.max_sequence_kl": ("1e-9", ("device.precision=bf16",)),
    "algorithm.entropy_weight": ("0.1", ()),
    "algorithm.num_iterations": ("2", ()),
    "algorithm.minibatches": ("2", ()),
    "algorithm.resample": ("2", ("temperature=0.3",)),
    "device.kind": ("cuda", ()),
    "device.precision": ("bf16", ()),
    "device.memory_gb": ("0.001", ()),
    "rollout.ahead": ("1", ()),
}  # fmt: skip
# What leaves no trace in such a run, and the test that shows what it does.
ELSEWHERE = {
    "model.wheel": "test_setup.py",
    "device.token_budget": "test_budget.py",
    "device.cache_budget": "test_rollout.py",
    "device.gradient_checkpointing": "test_forward.py",
    "resume": "test_resume.py",
    "sweep_dir": "test_sweep.py",
    "parallel": "the one choice, none",
    "adapter": "test_adapter.py",
    "reward.answer.sources": "test_rewards.py",
}
GROUPS = ("doctor.", "tracking.")  # test_doctor.py, test_tracking.py
NOT_MEASURED = ("time/", "perf/", "memory/")


def list_keys() -> list[str]:
    keys = flatten_keys(compose("experiment=smoke"), "")
    leaves = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    return [key for key in leaves if not key.endswith("_target_") and not key.startswith(GROUPS)]


def test_every_key_is_here() -> None:
    assert set(list_keys()) == (set(CHANGED) | set(ELSEWHERE)) & set(list_keys())
    assert set(CHANGED) <= set(list_keys())


def read_outcome(run: Path) -> dict[str, Any]:
    """What a run leaves, but for what depends on the clock and the machine."""
    if not (run / "metrics.jsonl").is_file():
        return {}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    weights = run / "checkpoints/latest/model/model.safetensors"
    return {
        "metrics": [
            {key: value for key, value in line.items() if not key.startswith(NOT_MEASURED)}
            for line in lines
        ],
        "completions": (run / "completions.jsonl").read_text(),
        "objective": summary["objective"]["name"],
        "device": summary["device"],
        "steps": summary["total_steps"],
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir()),
        "log": [
            line.partition("INFO")[2].split(" on ")[0]
            for line in (run / "train.log").read_text().splitlines()
            if " steps of " in line
        ],
    }


@pytest.fixture(scope="module")
def known() -> dict[tuple[str, ...], dict[str, Any]]:
    """What runs left that others are compared with."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("key", CHANGED)
def test_a_key_that_is_changed_changes_something(
    key: str, known: dict[tuple[str, ...], dict[str, Any]], grpo: Grpo, tmp_path: Path
) -> None:
    value, beside = CHANGED[key]
    if beside not in known:
        code, printed = grpo(*USUAL, *beside, "hydra.run.dir=usual")
        if code:  # as where an overlap is refused that a key allows
            assert code == 2, printed
        known[beside] = read_outcome(tmp_path / "usual")
    code, printed = grpo(*USUAL, *beside, f"{key}={value}", "hydra.run.dir=changed")
    assert code in (0, 2), printed
    if code == 2:
        assert key.partition(".")[0] in printed.splitlines()[-1]
    assert read_outcome(tmp_path / "changed") != known[beside]
