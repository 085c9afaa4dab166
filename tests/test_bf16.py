"""Training in bf16, as on a GPU: by its branches, on a CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo import train
from tests.test_algorithms import combinations
from tests.test_end_to_end import lines

Grpo = Callable[..., tuple[int, str]]
BF16 = ("device=cpu", "device.precision=bf16", "tracking=none", "hydra.run.dir=run")
SHORT = (
    "batch_size=2", "num_generation=4", "max_new_tokens=24", "max_steps=2", "eval.every=0",
    "eval.samples=1", "dataset.size=20", "dataset.eval_size=1", "checkpoint.every=0",
)  # fmt: skip


def steps_of(folder: Path) -> list[dict[str, Any]]:
    steps = lines(folder / "run/metrics.jsonl")[1:]
    for step in steps:
        assert all(isinstance(v, float | int) and math.isfinite(v) for v in step.values())
    return steps


@pytest.mark.usefixtures("gpu_branches")
@pytest.mark.parametrize(("algorithm", "kl", "adapter"), combinations())
def test_each_combination_is_on_policy(
    algorithm: str, kl: str, adapter: str, grpo: Grpo, tmp_path: Path
) -> None:
    """With one update a step every ratio is 1, to the last bit; at first the KL is 0."""
    code, printed = grpo(
        f"algorithm={algorithm}", f"kl={kl}", f"adapter={adapter}", *BF16, *SHORT,
        "learning_rate=1e-3",
    )  # fmt: skip
    assert code == 0, printed
    steps = steps_of(tmp_path)
    for step in steps:
        assert step["policy/ratio_max"] == 1.0
        assert step["policy/clip_fraction"] == 0.0
        assert abs(step["sampler/kl"]) < 1e-3
    assert abs(steps[0].get("kl/k3", 0.0)) < 1e-9
    assert max(step["optim/grad_norm"] for step in steps) > 0


@pytest.mark.usefixtures("gpu_branches")
@pytest.mark.parametrize("engine", ["native", "hf"])
@pytest.mark.parametrize("algorithm", ["grpo", "gspo"])
def test_several_updates_start_from_the_policy_that_is_updated(
    algorithm: str, engine: str, grpo: Grpo, tmp_path: Path
) -> None:
    """At a rate that moves nothing all ratios are 1, but for other micro-batches."""
    code, printed = grpo(
        f"algorithm={algorithm}", f"rollout={engine}", *BF16, *SHORT, "learning_rate=1e-30",
        "algorithm.num_iterations=2", "algorithm.minibatches=2",
    )  # fmt: skip
    assert code == 0, printed
    for step in steps_of(tmp_path):
        assert step["policy/ratio_max"] == pytest.approx(1.0, abs=1e-4)
        assert step["policy/clip_fraction"] == 0.0


class NoFloat64(TorchDispatchMode):
    """Refuses every operation that makes a float64, which MPS doesn't have."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            assert getattr(tensor, "dtype", None) != torch.float64, function
        return made


@pytest.mark.usefixtures("gpu_branches")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "overrides",
    [
        ("kl=full", "algorithm.minibatches=2", "algorithm.entropy_weight=0.1"),
        ("algorithm=gpg", "kl.within=reward", "sampling.top_p=0.9", "adapter=lora"),
        ("algorithm=bnpo", "algorithm.top_entropy=0.5", "optim.schedule=cosine"),
    ],
    ids=" ".join,
)
def test_a_step_makes_no_float64(
    overrides: tuple[str, ...], precision: str, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, seen = train.train_step, []

    def watched(*arguments: Any) -> dict[str, float]:
        seen.append(1)
        with NoFloat64():
            return step(*arguments)

    monkeypatch.setattr(train, "train_step", watched)
    code, printed = grpo(*BF16, *SHORT, f"device.precision={precision}", *overrides)
    assert code == 0, printed
    assert len(seen) == 2
