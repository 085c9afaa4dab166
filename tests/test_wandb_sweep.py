"""The YAML of a W&B sweep, and the command that its agent would run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent


def read_sweep(*overrides: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/wandb_sweep.py"), *overrides],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    content: dict[str, Any] = yaml.safe_load(done.stdout)
    return content


def test_a_search_becomes_a_bayesian_sweep() -> None:
    found = read_sweep("sweep=search")
    assert found["method"] == "bayes"
    assert found["metric"] == {"name": "eval/sampled_accuracy", "goal": "maximize"}
    assert found["run_cap"] == 30
    assert found["parameters"]["learning_rate"] == {
        "distribution": "log_uniform_values", "min": 1e-5, "max": 2e-3,
    }  # fmt: skip
    assert found["parameters"]["num_generation"] == {"values": [4, 8, 16]}
    assert found["parameters"]["kl_weight"] == {"distribution": "uniform", "min": 0.0, "max": 0.1}


def test_whole_numbers_over_magnitudes_stay_whole() -> None:
    found = read_sweep("sweep=search", "batch_size=tag(log,int(interval(4,64)))")
    values = found["parameters"]["batch_size"]["values"]
    assert values[0] == 4
    assert values[-1] == 64
    assert values == sorted(set(values))
    assert all(type(value) is int for value in values)


def test_a_grid_stays_one() -> None:
    found = read_sweep("sweep=kl_grid", "seed=0,1")
    assert found["method"] == "grid"
    assert found["parameters"]["seed"] == {"values": [0, 1]}  # the command line wins
    assert found["parameters"]["kl_weight"] == {"values": [0, 0.01, 0.1]}


def test_a_study_of_ones_own_and_less_of_it_is_better(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/mine.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    direction: minimize\n"
        "    params:\n      kl_weight: 0,0.5\n"
    )
    found = read_sweep("--config-dir", str(tmp_path), "sweep=mine")
    assert found["parameters"] == {"kl_weight": {"values": [0, 0.5]}}
    assert found["metric"] == {"name": "eval/sampled_accuracy", "goal": "minimize"}
    assert found["command"][:3] == ["grpo", "--config-dir", str(tmp_path)]


@pytest.mark.slow
def test_the_agents_command_trains(tmp_path: Path) -> None:
    """It trains one run, with the agent's values and the agent's run id."""
    found = read_sweep(
        "sweep=search", "experiment=smoke", "max_steps=1", "eval.samples=1",
        "dataset.eval_slice=:16",
    )  # fmt: skip
    chosen = {"learning_rate": 0.000123, "kl_weight": 0.05, "num_generation": 4, "temperature": 0.9}
    assert set(chosen) == set(found["parameters"])
    arguments = [f"{key}={value}" for key, value in chosen.items()]
    command = []
    for word in found["command"]:
        command += arguments if word == "${args_no_hyphens}" else [word]
    assert command[0] == found["program"] == "grpo"
    done = subprocess.run(
        [sys.executable, "-m", *command, "hydra.run.dir=run"], cwd=tmp_path,
        capture_output=True, text=True,
        env={**os.environ, "WANDB_RUN_ID": "agent123"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (offline,) = (tmp_path / "run/wandb").glob("offline-run-*")
    assert offline.name.endswith("agent123")
    config = yaml.safe_load((tmp_path / "run/.hydra/config.yaml").read_text())
    assert {key: config[key] for key in chosen} == chosen
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["status"] == "finished"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ((), "nothing to sweep"),
        (
            (
                "sweep=search",
                "hydra.sweeper.objectives={eval/accuracy: maximize, kl/mean: minimize}",
            ),
            "a W&B sweep has one",
        ),
        (("sweep=search", "hydra.sweeper.sampler=grid"), "sampler=grid"),
    ],
)
def test_what_wandb_cant_sweep_is_refused(overrides: tuple[str, ...], says: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/wandb_sweep.py"), *overrides],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert says in done.stderr
