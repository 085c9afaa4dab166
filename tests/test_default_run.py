"""The default run, its first twelve steps: it learns, and the doctor has nothing to say of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo.report.run.read import read_run
from tests.conftest import make_once, run_grpo


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:

    def make(cwd: Path) -> None:
        short = ("max_steps=12", "eval.every=0", "dataset.eval_slice=:64", "eval.samples=4")
        done = run_grpo(*short, "tracking=none", "hydra.run.dir=run", cwd=cwd)
        assert done.returncode == 0, done.stderr

    return make_once(tmp_path_factory, "default", make) / "run"


def test_it_learns(run: Path) -> None:
    """Held-out sums, as it samples."""
    first, *_, last = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert first["eval/sampled_accuracy"] <= 0.5
    assert last["eval/sampled_accuracy"] >= first["eval/sampled_accuracy"] + 0.2


def test_a_healthy_run_has_nothing(run: Path) -> None:
    assert not read_run(run).diagnoses
    assert "The doctor found nothing wrong." in (run / "report.html").read_text()
