"""Every algorithm, with every KL and every adapter, trains; and each of them learns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo.config.schema import find_conf_folder
from tests.conftest import read_lines

Grpo = Callable[..., tuple[int, str]]


def list_choices(group: str) -> list[str]:
    return sorted(file.stem for file in (find_conf_folder() / group).glob("[!_]*.yaml"))


def combine_choices() -> list[Any]:
    """Every two of the three together; slow are those that differ from the usual in two of them,
    and the algorithms that differ in a loss alone, which test_objective.py has by hand.
    """
    usual = ("grpo", "k3", "none")
    in_a_loss = ("bnpo", "cispo", "dr_grpo", "gpg", "luspo", "sapo", "vespo")
    cases = []
    for chosen in itertools.product(
        list_choices("algorithm"), list_choices("kl"), list_choices("adapter")
    ):
        apart = sum(choice != default for choice, default in zip(chosen, usual, strict=True))
        if apart < 3:
            slow = apart == 2 or chosen[0] in in_a_loss
            cases.append(pytest.param(*chosen, marks=pytest.mark.slow if slow else ()))
    return cases


@pytest.mark.parametrize(("algorithm", "kl", "adapter"), combine_choices())
def test_each_combination_trains(
    algorithm: str, kl: str, adapter: str, grpo: Grpo, tmp_path: Path
) -> None:
    """Two steps of two passes in two minibatches: finite numbers, and weights that move."""
    code, printed = grpo(
        f"algorithm={algorithm}", f"kl={kl}", f"adapter={adapter}", "tracking=none",
        "algorithm.num_iterations=2", "algorithm.minibatches=2", "learning_rate=1e-3",
        "kl_weight=0.02",
        "batch_size=2", "num_generation=4", "max_new_tokens=24", "max_steps=2", "eval.every=0",
        "eval.samples=1", "dataset.size=20", "dataset.eval_size=1", "checkpoint.every=0",
        "hydra.run.dir=run",
    )  # fmt: skip
    assert code == 0, printed
    steps = read_lines(tmp_path / "run/metrics.jsonl")[1:]
    for step in steps:
        assert all(isinstance(v, float | int) and math.isfinite(v) for v in step.values())
        assert ("kl/mean" in step) == (kl != "none")
        assert ("kl/full" in step) == (kl == "full")
    # Where all of a step's groups agree, and nothing else gives a gradient, it moves nothing.
    assert max(step["optim/grad_norm"] for step in steps) > 0
    assert max(step["policy/ratio_max"] for step in steps) > 1.001  # it moved between the updates


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", list_choices("algorithm"))
def test_each_algorithm_teaches_the_tiny_model_to_add(
    algorithm: str, grpo: Grpo, tmp_path: Path
) -> None:
    """In a quarter of the default run; docs/results.md has the whole one."""
    code, printed = grpo(
        f"algorithm={algorithm}", "max_steps=25", "tracking=none", "eval.every=0",
        "dataset.eval_slice=:64", "eval.samples=8", "checkpoint.every=0", "hydra.run.dir=run",
    )  # fmt: skip
    assert code == 0, printed
    metrics = read_lines(tmp_path / "run/metrics.jsonl")
    assert metrics[0]["eval/sampled_accuracy"] <= 0.5
    assert metrics[-1]["eval/sampled_accuracy"] >= 0.85
