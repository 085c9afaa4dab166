"""The terminal: curves in characters, the live views of a run and of a sweep."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.runs.files import write_json
from grpo.runs.lock import locked
from grpo.sweep.folder import JobState, Record
from grpo.sweep.view import View
from grpo.tracking.text_charts import average_bins, draw_chart


@pytest.mark.parametrize(
    ("values", "width", "height", "rows"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, 1, ["▁▂▃▄▅▆▇█"]),
        ([0, 7], 8, 1, ["▁█"]),
        ([0, 0, 7, 7], 2, 1, ["▁█"]),  # means of two
        ([0, 15], 9, 2, [" █", "▁█"]),
        ([3, 3], 4, 2, ["  ", "▁▁"]),  # constant values
        ([1, math.nan, 2], 3, 1, ["▁ █"]),
        ([], 5, 2, ["", ""]),
    ],
)
def test_curves(values: list[float], width: int, height: int, rows: list[str]) -> None:
    assert draw_chart(values, width, height) == rows


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(1, 80))
def test_each_column_is_the_mean_of_its_share(values: list[float], count: int) -> None:
    columns = average_bins(values, count)
    assert len(columns) == min(count, len(values))
    known = [mean for mean in columns if mean is not None]
    assert min(values) - 1e-6 <= min(known) <= max(known) <= max(values) + 1e-6
    if len(values) % len(columns) == 0:
        assert sum(known) / len(known) == pytest.approx(sum(values) / len(values), abs=1e-3)


def run_in_terminal(*arguments: str, cwd: Path, columns: int = 120, rows: int = 40) -> str:
    """Returns all that `grpo …` sends to a terminal of this size."""
    controller, terminal = pty.openpty()
    env = {**os.environ, "COLUMNS": str(columns), "LINES": str(rows), "TERM": "xterm-256color"}
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo", *arguments],
        cwd=cwd, stdin=terminal, stdout=terminal, stderr=terminal, env=env, start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    output, deadline = b"", time.monotonic() + 300
    while time.monotonic() < deadline:
        ready, _, _ = select.select([controller], [], [], 0.2)
        if ready:
            try:
                piece = os.read(controller, 65536)
            except OSError:  # the other end is closed
                break
            output += piece
            if not piece:
                break
    assert process.wait(30) == 0, output.decode()
    os.close(controller)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode())


JOB = ("experiment=smoke", "tracking=none", "max_steps=4", "dataset.eval_slice=:16")


@pytest.mark.slow
def test_a_wide_terminal_has_charts(tmp_path: Path) -> None:
    wide = run_in_terminal(*JOB, "hydra.run.dir=run", cwd=tmp_path)
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()][1:]
    rewards = [step["reward/mean"] for step in steps]
    assert f"reward {rewards[0]:.3g} \u2192 {rewards[-1]:.3g}" in wide
    assert re.search(r"kl \S+ \u2192 \S+ +length \S+ \u2192", wide)
    if max(rewards) > min(rewards):
        assert "█" in wide


@pytest.mark.slow
def test_a_narrow_terminal_has_a_line(tmp_path: Path) -> None:
    narrow = run_in_terminal(*JOB, "hydra.run.dir=narrow", cwd=tmp_path, columns=80)
    assert "step 4/4" in narrow
    assert "\u2192 " not in narrow.partition("finished:")[0]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_sweep_shows_its_jobs_and_they_leave_it_the_terminal(
    launcher: str, tmp_path: Path
) -> None:
    output = run_in_terminal(
        "-m", *JOB, "max_steps=12", "eval.every=0", "seed=0,1", f"hydra/launcher={launcher}",
        "sweep_dir=sweep", cwd=tmp_path,
    )  # fmt: skip
    assert "2 to run" in output
    assert re.search(r"job [01]  step \d+/12  reward 0\.\d+  [▁▂▃▄▅▆▇█ ]+  .*seed=[01]", output)
    assert "2 finished" in output
    assert not re.search(r"step \d+/12  reward \S+  kl", output)  # a job's own live line
    assert len(list((tmp_path / "sweep").glob("*/report.html"))) == 2


def read_value(job: JobState) -> float | None:
    return (job.summary.get("objective") or {}).get("value")


def put_job(sweep: Path, number: int, steps: int = 0, **summary: object) -> Path:
    """Writes the folder of a job that has done `steps` of eight steps."""
    folder = sweep / str(number)
    folder.mkdir(exist_ok=True)
    write_json(folder / "summary.json", {"total_steps": 8, **summary})
    lines = [{"step": n, "time/step": 1.0, "reward/mean": 0.5} for n in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_what_the_view_says_of_a_sweep(tmp_path: Path) -> None:
    """Two and a half jobs took ten seconds: each takes four, so six seconds are left."""
    jobs = [["kl_weight=0"], ["kl_weight=0.1"], ["kl_weight=0.2"], ["kl_weight=0.3"]]
    Record([], None, jobs).write(tmp_path)
    view = View(tmp_path, 4, read_value, False)
    assert str(view.render_view(100).renderables[0]) == "4 to run"
    for number, value in ((0, 0.25), (1, 0.75)):
        objective = {"name": "eval/accuracy", "value": value}
        put_job(tmp_path, number, status="finished", objective=objective)
    running = put_job(tmp_path, 2, 4, status="running")
    view.started = time.monotonic() - 10
    with locked(running):
        head, job = map(str, view.render_view(100).renderables)
    assert head == ("2 finished, 1 running, 1 to run  best 0.75: job 1, kl_weight=0.1  0m06s left")
    assert job == "  job 2  step 4/8  reward 0.500  ▁▁▁▁  kl_weight=0.2"
    least = View(tmp_path, 4, read_value, True)
    assert "best 0.25: job 0" in str(least.render_view(100).renderables[0])


def test_what_the_view_says_of_broken_jobs(tmp_path: Path) -> None:
    """In a resumed sweep, job 0 failed after 2 of 8 steps and job 1 was killed after 4."""
    Record([], None, [["seed=0"], ["seed=1"], ["seed=2"]]).write(tmp_path)
    before = put_job(tmp_path, 0, 2, status="failed", error="no room on the disk")
    os.utime(before / "summary.json", (0, 0))  # a kernel's clock may be coarse
    put_job(tmp_path, 1, 4, status="running")
    view = View(tmp_path, 3, read_value, False)
    assert [str(line) for line in view.render_view(100).renderables] == ["2 to run again, 1 to run"]
    assert view.jobs_done_before == pytest.approx(0.25 + 0.5)

    # Run again, the first fails once more, and the second has all but one step in 3.75 seconds:
    # 0.75 + 0.375 more jobs of 3 are done, so each takes 10/3 s, and 1.125 are left.
    put_job(tmp_path, 0, 2, status="failed", error="no room on the disk\nwhere it was")
    running = put_job(tmp_path, 1, 7, status="running")
    view.started = time.monotonic() - 3.75
    with locked(running):
        head, failed, job = map(str, view.render_view(100).renderables)
    assert head == "1 failed, 1 running, 1 to run  0m04s left"
    assert failed == "  job 0  failed: no room on the disk"
    assert job.startswith("  job 1  step 7/8")
