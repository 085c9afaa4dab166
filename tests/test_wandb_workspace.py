"""scripts/wandb_workspace: the dashboard as code, by its own JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo.report.run.charts import CHART_SECTIONS

pytest.importorskip("wandb_workspaces", reason="pip install wandb-workspaces")
ROOT = Path(__file__).parents[1]


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    without_key = {k: v for k, v in os.environ.items() if k != "WANDB_API_KEY"}
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/wandb_workspace.py"), *arguments],
        capture_output=True,
        text=True,
        env={**without_key, "HOME": "/nonexistent"},
    )


def read_sections(*arguments: str) -> dict[str, list[dict[str, Any]]]:
    """Returns each section's panels, as they are sent to W&B."""
    done = run_script(*arguments, "--print")
    assert done.returncode == 0, done.stderr
    view = json.loads(done.stdout)
    content = view["spec"]["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in content}


def test_the_view_of_runs_has_the_pages_sections_and_metrics() -> None:
    found = read_sections("me/grpo-bench")
    assert list(found)[: len(CHART_SECTIONS)] == list(CHART_SECTIONS)
    for title, charts in CHART_SECTIONS.items():
        drawn = [panel["config"].get("metrics", []) for panel in found[title]]
        wanted = [list(c.metrics) if c.metrics != ("reward/*",) else [] for c in charts]
        assert drawn == wanted
        assert {panel["config"]["xAxis"] for panel in found[title]} == {"step"}
    text = json.dumps(found)
    for name in ("reward", "advantage", "length", "ratio"):
        assert f"histogram/{name}" in text
    assert "completions" in json.dumps(found["What it wrote"])


def test_the_view_of_a_sweep_is_about_its_keys() -> None:
    found = read_sections("me/grpo-bench", "sweep=search")
    types = [panel["viewType"] for panel in found["The answer"]]
    assert types == ["Parallel Coordinates Plot", "Parameter Importance", "Scatter Plot"]
    text = json.dumps(found["The answer"][0])
    for key in ("learning_rate", "kl_weight", "num_generation", "temperature"):
        assert key in text
    assert len(found["By key"]) == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "ENTITY/PROJECT"),
        (("grpo-bench",), "ENTITY/PROJECT"),
        (("me/grpo-bench", "kl_weight=0.1"), "nothing to sweep"),
        (("me/grpo-bench", "kl_wieght=0,1"), "kl_weight"),
        (("me/grpo-bench",), "wandb login"),
    ],
)
def test_what_it_cant_do(arguments: tuple[str, ...], says: str) -> None:
    done = run_script(*arguments)
    assert done.returncode == 2, done.stdout
    assert says in done.stderr
    assert "Traceback" not in done.stderr
