"""The sinks: each holds the numbers of metrics.jsonl, and data that only it can show."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo.tracking.wandb_sink import BEST_IS_HIGHEST, METRIC_SECTIONS
from tests.conftest import make_once, read_lines, run_grpo

Grpo = Callable[..., tuple[int, str]]
JOB = ("experiment=smoke", "max_steps=4", "num_generation=4", "dataset.eval_slice=:16")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that W&B and Trackio recorded."""

    def make(cwd: Path) -> None:
        done = run_grpo(
            *JOB, "tracking=[wandb,trackio]", "hydra.run.dir=run",
            "tracking.wandb.notes=why it ran", "tracking.wandb.tags=[first]",
            "tracking.wandb.log_model=true", "tracking.wandb.table_every=2",
            "tracking.trackio.table_every=2", cwd=cwd,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "wandb sync" in done.stderr
        assert "to see it: grpo dashboard" in done.stderr

    return make_once(tmp_path_factory, "tracked", make)


@pytest.fixture(scope="module")
def records(both: Path) -> list[dict[str, Any]]:
    return inspect_records(both / "run")


def inspect_records(run: Path) -> list[dict[str, Any]]:
    """Returns the records that W&B wrote, read by W&B's own reader."""
    (offline,) = (run / "wandb").glob("offline-run-*")
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(offline)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def select_type(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in records if record["type"] == kind]


def merge_history(records: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Returns the values that W&B has for each step."""
    by_step: dict[int, dict[str, Any]] = {}
    for record in select_type(records, "history"):
        by_step.setdefault(record["step"].get("num", 0), {}).update(record["item"])
    return by_step


def test_wandbs_own_log_is_in_the_runs_folder(both: Path) -> None:
    assert list((both / "run/wandb/cache").rglob("core-debug-*.log"))


def test_wandb_has_every_number(both: Path, records: list[dict[str, Any]]) -> None:
    logged = merge_history(records)
    for line in read_lines(both / "run/metrics.jsonl"):
        assert {key: logged[line["step"]][key] for key in line} == line


def test_wandb_draws_every_metric_over_the_training_step(
    both: Path, records: list[dict[str, Any]]
) -> None:
    logged = {key for line in read_lines(both / "run/metrics.jsonl") for key in line} - {"step"}
    assert {key.partition("/")[0] for key in logged} <= set(METRIC_SECTIONS)
    metrics = select_type(records, "metric")
    over = {m.get("glob_name") or m["name"]: m.get("step_metric") for m in metrics}
    assert all(over[f"{section}/*"] == "step" for section in METRIC_SECTIONS)
    best = {m["name"]: m["summary"] for m in metrics if m.get("name") in BEST_IS_HIGHEST}
    assert best == {name: {"last": True, "max": True} for name in BEST_IS_HIGHEST}


def test_wandb_has_the_distributions_behind_the_means(
    both: Path, records: list[dict[str, Any]]
) -> None:
    logged, means = merge_history(records), read_lines(both / "run/metrics.jsonl")[1:]
    completions = 4 * 4  # a step of experiment=smoke
    for line in means:
        values = logged[line["step"]]
        for name in ("reward", "advantage", "length"):
            assert sum(values[f"histogram/{name}.values"]) == completions
        tokens = round(line["completion/length_mean"] * completions)
        assert sum(values["histogram/ratio.values"]) == tokens
        bins = values["histogram/length.bins"]
        assert bins[0] <= line["completion/length_mean"] <= bins[-1]
        assert bins[-1] >= line["completion/length_max"]


def test_wandbs_table_keeps_what_it_had(both: Path, records: list[dict[str, Any]]) -> None:
    """Each log adds its rows; earlier rows are referenced and not sent again."""
    logged = merge_history(records)
    rows = Counter(line["step"] for line in read_lines(both / "run/completions.jsonl"))
    tables = {n: values for n, values in logged.items() if values.get("completions._type")}
    assert list(tables) == [2, 4]
    assert tables[2]["completions.nrows"] == rows[2]
    assert tables[4]["completions.increment_num"] == 1
    assert tables[4]["completions.previous_increments_paths"] == [
        tables[2]["completions.artifact_path"]
    ]


def test_wandb_knows_why_and_with_what_it_ran(both: Path, records: list[dict[str, Any]]) -> None:
    (run,) = select_type(records, "run")
    assert (
        run["display_name"] == "smoke-run"
    )  # by its folder, the only difference between single runs
    assert run["notes"] == "why it ran"
    assert run["tags"] == ["first"]
    commit = json.loads((both / "run/summary.json").read_text())["git_commit"]
    assert re.fullmatch(r"[0-9a-f]{40}\+?", commit)  # the tests are of a checkout
    assert run["config"]["update"]["git_commit"] == commit


def test_the_trained_model_is_an_artifact_where_it_is_wanted(
    both: Path, records: list[dict[str, Any]], grpo: Grpo, tmp_path: Path
) -> None:
    (artifact,) = (
        record for record in select_type(records, "artifact") if record["type"] == "model"
    )
    assert "model.safetensors" in json.dumps(artifact)
    places = re.findall(r'"local_?path": "([^"]+)"', json.dumps(artifact), re.IGNORECASE)
    assert places
    assert all(
        place.startswith(str(both / "run")) for place in places
    )  # all files are in the run's folder
    assert grpo(*JOB, "max_steps=1", "tracking=wandb", "hydra.run.dir=run")[0] == 0
    (offline,) = (tmp_path / "run/wandb").glob("offline-run-*")
    assert b"model.safetensors" not in next(offline.glob("*.wandb")).read_bytes()


@pytest.mark.slow
def test_an_evaluation_is_a_run_of_its_own(both: Path) -> None:
    run(both, "eval", "checkpoint=run", "eval.samples=2", "hydra.run.dir=evaluated")
    found = json.loads((both / "evaluated/evaluation.json").read_text())
    records = inspect_records(both / "evaluated")
    (recorded,) = select_type(records, "run")
    assert recorded["job_type"] == "eval"
    assert recorded["display_name"] == "eval-smoke-evaluated"
    (line,) = merge_history(records).values()
    assert line["eval/accuracy"] == found["eval/accuracy"]
    assert line["completions.nrows"] == 3 * found["prompts"]


def read_trackio_logs(cwd: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns each run's lines in Trackio's database, read in a separate process."""
    code = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as s\n"
        "runs = s.get_runs('grpo-bench')\n"
        "print(json.dumps({r: s.get_logs('grpo-bench', r) for r in runs}, default=str))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "TRACKIO_DIR": str(cwd / "outputs/trackio")},
    )  # fmt: skip
    content: dict[str, list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return content


def test_trackio_has_every_number(both: Path) -> None:
    (name,) = (run_name for run_name in read_trackio_logs(both) if not run_name.startswith("eval-"))
    logged = read_trackio_logs(both)[name]
    assert name.startswith("smoke-run-")
    written = read_lines(both / "run/metrics.jsonl")
    assert [line["step"] for line in logged] == [line["step"] for line in written]
    for logged_line, line in zip(logged, written, strict=True):
        assert {key: logged_line[key] for key in line} == line
    assert sum(logged[1]["histogram/reward"]["values"]) == 16
    assert [line["step"] for line in logged if "completions" in line] == [2, 4]


def run(cwd: Path, *arguments: str) -> None:
    done = run_grpo(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_trackio_goes_on_with_the_same_run(tmp_path: Path) -> None:
    """Repeated steps are recorded once, and earlier steps are kept."""
    job = (*JOB, "tracking=trackio", "hydra.run.dir=run")
    run(tmp_path, *job, "max_steps=3", "checkpoint.every=2", "checkpoint.keep=9")
    before = next(iter(read_trackio_logs(tmp_path).values()))
    shutil.rmtree(tmp_path / "run/checkpoints/step_3")  # as if it had been killed before this step
    (tmp_path / "run/checkpoints/latest").unlink()
    (tmp_path / "run/checkpoints/latest").symlink_to("step_2")
    run(tmp_path, "resume=run", "max_steps=5")
    ((_, logged),) = read_trackio_logs(tmp_path).items()
    assert [line["step"] for line in logged] == list(range(6))
    kept = [{k: v for k, v in line.items() if k != "timestamp"} for line in before]
    assert [{k: v for k, v in line.items() if k != "timestamp"} for line in logged[:3]] == kept[:3]


@pytest.mark.slow
def test_wandbs_own_environment_counts(tmp_path: Path) -> None:
    """A key that is set wins; otherwise W&B's variables apply."""
    env = {
        "WANDB_PROJECT": "theirs", "WANDB_ENTITY": "team", "WANDB_RUN_GROUP": "group of theirs",
        "WANDB_TAGS": "one,two", "WANDB_NOTES": "by the environment",
    }  # fmt: skip
    usual = (*JOB, "max_steps=1", "tracking=wandb", "tracking.wandb.mode=offline")
    for name, overrides in (("theirs", ()), ("ours", ("tracking.wandb.project=ours",))):
        done = run_grpo(*usual, *overrides, f"hydra.run.dir={name}", cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        (run,) = select_type(inspect_records(tmp_path / name), "run")
        assert run["project"] == name
        assert run["entity"] == "team"
        assert run["run_group"] == "group of theirs"
        assert run["tags"] == ["one", "two"]
        assert run["notes"] == "by the environment"


@pytest.mark.slow
def test_jobs_of_a_sweep_are_runs_of_their_own_in_trackio(tmp_path: Path) -> None:
    run(tmp_path, "-m", *JOB, "max_steps=1", "tracking=trackio", "seed=0,1", "sweep_dir=my_sweep")
    logged = read_trackio_logs(tmp_path)
    assert sorted(name.rpartition("-")[0] for name in logged) == [
        "smoke-0",
        "smoke-1",
    ]
    assert [line["step"] for run_lines in logged.values() for line in run_lines] == [0, 1, 0, 1]


@pytest.mark.slow
def test_jobs_of_one_process_share_trackios_folder(tmp_path: Path) -> None:
    done = run_grpo(
        "-m", *JOB, "max_steps=1", "tracking=trackio", "tracking.trackio.folder=one,other",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert "tracking.trackio.folder=other: Trackio writes to" in done.stderr


def test_a_trackio_folder_that_cant_be_written_is_refused(grpo: Grpo, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    code, printed = grpo(*JOB, "tracking=trackio", "tracking.trackio.folder=taken/trackio")
    assert code == 2
    assert "tracking.trackio.folder=" in printed
    assert "can't be made or written" in printed
    assert "Traceback" not in printed
