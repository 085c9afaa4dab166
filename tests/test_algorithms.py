"""Every algorithm, with every KL and every adapter, trains; and each of them learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo.config import conf_folder
from tests.test_end_to_end import lines

Grpo = Callable[..., tuple[int, str]]


def choices(group: str) -> list[str]:
    return sorted(file.stem for file in (conf_folder() / group).glob("[!_]*.yaml"))


@pytest.mark.parametrize("adapter", choices("adapter"))
@pytest.mark.parametrize("kl", choices("kl"))
@pytest.mark.parametrize("algorithm", choices("algorithm"))
def test_each_combination_trains(
    algorithm: str, kl: str, adapter: str, grpo: Grpo, tmp_path: Path
) -> None:
    """Two steps of two passes in two minibatches: finite numbers, and weights that move."""
    code, printed = grpo(
        f"algorithm={algorithm}", f"kl={kl}", f"adapter={adapter}", "tracking=none",
        "algorithm.num_iterations=2", "algorithm.minibatches=2", "learning_rate=1e-3",
        "batch_size=2", "num_generation=4", "max_new_tokens=24", "max_steps=2", "eval.every=0",
        "eval.samples=1", "dataset.size=20", "dataset.eval_size=1", "checkpoint.every=0",
        "hydra.run.dir=run",
    )  # fmt: skip
    assert code == 0, printed
    last = lines(tmp_path / "run/metrics.jsonl")[-1]
    assert all(isinstance(value, float | int) and math.isfinite(value) for value in last.values())
    assert last["optim/grad_norm"] > 0
    assert last["policy/ratio_max"] > 1  # the policy moved between the updates
    assert ("kl/mean" in last) == (kl != "none")
    assert ("kl/full" in last) == (kl == "full")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", choices("algorithm"))
def test_each_algorithm_teaches_the_tiny_model_to_add(
    algorithm: str, grpo: Grpo, tmp_path: Path
) -> None:
    code, printed = grpo(
        f"algorithm={algorithm}", "tracking=none", "eval.every=0", "checkpoint.every=0",
        "hydra.run.dir=run",
    )  # fmt: skip
    assert code == 0, printed
    metrics = lines(tmp_path / "run/metrics.jsonl")
    assert metrics[0]["eval/sampled_accuracy"] <= 0.5
    assert metrics[-1]["eval/sampled_accuracy"] >= 0.85
