"""A sweep on a Ray cluster of this machine: scripts/test_ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import run_grpo, wait_for_step
from tests.test_sweep import QUICK, TWO_STEPS, is_saved_where_it_stopped, list_statuses

pytest.importorskip("ray")

RAY = ("hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2")


def test_a_sweep_runs_on_a_cluster(tmp_path: Path) -> None:
    """A job that fails doesn't stop the others there either."""
    (tmp_path / "my_rewards_of_ray.py").write_text(
        "def picky(samples, limit):\n"
        "    if limit == 1:\n"
        "        raise ValueError('no more of this')\n"
        "    return [1.0 for _ in samples]\n"
    )
    done = run_grpo(
        "-m", *TWO_STEPS, *RAY, "+reward.picky._target_=my_rewards_of_ray.picky",
        "+reward.picky.weight=1", "+reward.picky.limit=0,1,2", "sweep_dir=sweep", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert list_statuses(tmp_path / "sweep") == ["finished", "failed", "finished"]
    assert "no more of this" in done.stderr


def test_a_sweep_on_a_cluster_stops_in_order(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "grpo", "-m", *QUICK, *RAY, "max_steps=40", "seed=0,1,2",
             "checkpoint.every=0", "eval.every=0", "sweep_dir=sweep"],
            cwd=tmp_path, stdout=log, stderr=log,
        )  # fmt: skip
    sweep = tmp_path / "sweep"
    for number in "01":
        wait_for_step(sweep / number, 2, process)  # type: ignore[arg-type]
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(120) == 130, (tmp_path / "log").read_text()
    assert list_statuses(sweep) == ["interrupted", "interrupted", "none"]
    assert all(is_saved_where_it_stopped(sweep / number) for number in "01")
