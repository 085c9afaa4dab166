"""Grids and searches: real jobs, killed, interrupted, damaged and started again."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo.runs.lock import locked
from grpo.sweep.folder import number_jobs, read_job_states
from tests.conftest import (
    make_once,
    read_metrics,
    read_summary,
    run_grpo,
    start_grpo,
    wait_for_step,
)

Grpo = Callable[..., tuple[int, str]]

QUICK = ("experiment=smoke", "tracking=none", "eval.samples=1", "dataset.eval_slice=:16")
TWO_STEPS = (*QUICK, "max_steps=2")


def list_statuses(sweep: Path) -> list[str]:
    return [job.status for job in read_job_states(sweep)]


def is_saved_where_it_stopped(run: Path) -> bool:
    """Returns whether a run's newest checkpoint is of its last step."""
    return (run / "checkpoints/latest").resolve().name == f"step_{read_summary(run)['steps']}"


# A sweep that is interrupted gives the same results as one that is not.

GRID = ("-m", *QUICK, "max_steps=9", "checkpoint.every=2", "eval.every=0", "seed=0,1,2")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid that runs without interruption."""

    def make(cwd: Path) -> None:
        done = run_grpo(*GRID, "sweep_dir=sweep", cwd=cwd)
        assert done.returncode == 0, done.stderr

    return make_once(tmp_path_factory, "sweep", make) / "sweep"


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_same_numbers(whole: Path, tmp_path: Path) -> None:
    """Finished jobs are not touched, the killed job goes on, and the rest run."""
    sweep = tmp_path / "sweep"
    process = start_grpo(tmp_path, *GRID, "sweep_dir=sweep")
    wait_for_step(sweep / "1", 5, process)
    process.kill()
    process.wait()
    assert list_statuses(sweep) == ["finished", "killed", "none"]
    before = (sweep / "0/metrics.jsonl").stat().st_mtime_ns
    done = run_grpo("sweep_dir=sweep", cwd=tmp_path)  # -m is not needed
    assert done.returncode == 0, done.stderr
    assert "1 finished, 1 killed, 1 to run" in done.stdout
    assert (sweep / "0/metrics.jsonl").stat().st_mtime_ns == before
    for number in "012":
        assert read_metrics(sweep / number) == read_metrics(whole / number)  # bit for bit
    log = (sweep / "1/train.log").read_text()
    assert "step_4" in log or "step 4" in log  # it resumed and didn't start again


@pytest.mark.slow
def test_ctrl_c_ends_a_sweep_in_order(tmp_path: Path) -> None:
    """The running job is saved, and the next one doesn't start."""
    sweep = tmp_path / "sweep"
    process = start_grpo(tmp_path, *GRID, "sweep_dir=sweep")
    wait_for_step(sweep / "1", 3, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert list_statuses(sweep) == ["finished", "interrupted", "none"]
    assert is_saved_where_it_stopped(sweep / "1")


@pytest.mark.slow
def test_more_seeds_are_added_to_a_sweep(grpo: Grpo, tmp_path: Path) -> None:
    """Existing jobs keep their numbers; a job whose folder was deleted runs again."""
    assert grpo("-m", *TWO_STEPS, "kl_weight=0,0.1", "seed=1", "sweep_dir=sweep")[0] == 0
    before = (tmp_path / "sweep/1/summary.json").read_bytes()
    shutil.rmtree(tmp_path / "sweep/0")
    code, printed = grpo("-m", "sweep_dir=sweep", "seed=0,1")
    assert code == 0, printed
    assert "sweep of 4 jobs in sweep: 3 to run, 1 finished" in printed
    assert (tmp_path / "sweep/1/summary.json").read_bytes() == before
    overrides = [
        [o for o in job if o.startswith(("kl_weight", "seed"))]
        for job in json.loads((tmp_path / "sweep/sweep.json").read_text())["jobs"]
    ]
    assert overrides == [
        ["kl_weight=0", "seed=1"], ["kl_weight=0.1", "seed=1"],
        ["kl_weight=0", "seed=0"], ["kl_weight=0.1", "seed=0"],
    ]  # fmt: skip
    assert read_summary(tmp_path / "sweep/0")["status"] == "finished"


# A job that fails doesn't stop the others.

REWARDS = """
def picky(samples, limit):
    if limit == 1:
        raise ValueError("no more of this")
    return [1.0 for _ in samples]
"""


def test_a_job_that_fails_is_reported_at_the_end(grpo: Grpo, tmp_path: Path) -> None:
    (tmp_path / "my_rewards_of_sweep.py").write_text(REWARDS)
    code, printed = grpo(
        "-m", *TWO_STEPS, "+reward.picky._target_=my_rewards_of_sweep.picky",
        "+reward.picky.weight=1", "+reward.picky.limit=0,1,2", "sweep_dir=sweep",
    )  # fmt: skip
    assert code == 1
    end = printed[printed.index("did not end well") :]
    assert "1 of 3 jobs did not end well" in printed
    assert "job 1" in end
    assert "no more of this" in end
    assert "grpo -m sweep_dir=sweep" in end
    assert list_statuses(tmp_path / "sweep") == ["finished", "failed", "finished"]
    assert "no more of this" in read_summary(tmp_path / "sweep/1")["error"]


@pytest.mark.slow
def test_a_full_disk_in_one_job_costs_no_other(tmp_path: Path) -> None:
    disk = tmp_path / "sweep/0"
    disk.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small disk can't be mounted here")
    try:
        done = run_grpo("-m", *TWO_STEPS, "seed=0,1", "sweep_dir=sweep", cwd=tmp_path)
        assert done.returncode == 1
        (end,) = [line for line in done.stderr.splitlines() if line.startswith("  job 0: ")]
        assert "No space left on device" in end
        assert list_statuses(tmp_path / "sweep") == ["failed", "finished"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    done = run_grpo("-m", "sweep_dir=sweep", cwd=tmp_path)  # with room again
    assert done.returncode == 0, done.stderr


# Errors that can be known in advance are reported before the first job starts.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-m", "kl_weight=0"), "nothing to sweep"),
        (("-m", "kl_weight=0,0.1", "resume=auto"), "a sweep resumes its own jobs"),
        (("-m", "num_generation=1,2"), "num_generation=1"),
        (("-m", "kl_wieght=0,1"), "kl_weight"),
        (("-m", "seed=0,0"), "twice"),
        (("sweep=kl_grid", "seed=0,0"), "twice"),  # a study needs no -m
        (("-m", "kl_weight=interval(0,1)"), "hydra/sweeper=optuna"),
        (("-m", "model=tiny,tinny"), "tinny"),
        (("sweep_dir=sweep",), "holds no sweep"),
        (("-m", "seed=0,1", "sweep_dir=/proc/sweep"), "/proc/sweep"),
        (("-m", "hydra/sweeper=optuna", "kl_weight=0"), "nothing to search"),
        (("-m", "hydra/sweeper=optuna", "kl_weight=tag(log,interval(0,1))"), "can't be sampled"),
        (("-m", "hydra/sweeper=optuna", "kl_weight=interval(1,0)"), "can't be sampled"),
        (("-m", "hydra/sweeper=optuna", "seed=range(4,4)"), "can't be sampled"),
        (("-m", "hydra/sweeper=optuna", "kl_weight=tag(log,choice(1,2))"), "a logarithmic scale"),
        (("-m", "hydra/sweeper=optuna", "temperature=interval(0,1)"), "temperature"),
        (("-m", "hydra/sweeper=optuna", "seed=0,1", "hydra.sweeper.sampler=tpee"), "tpe"),
        (("-m", "hydra/sweeper=optuna", "seed=0,1", "hydra.sweeper.n_trials=0"), "n_trials=0"),
        (("-m", "hydra/sweeper=optuna", "seed=0,1", "hydra.sweeper.sampler=cmaes"), "cmaes"),
        (
            ("-m", "hydra/sweeper=optuna", "seed=0,1", "hydra.sweeper.objectives=eval/accuracy"),
            "{eval/accuracy: maximize}",
        ),
        (
            (
                "-m", "hydra/sweeper=optuna", "seed=0,1", "kl=none",
                "hydra.sweeper.objectives={kl/mean: minimize}",
            ),
            "kl=none has no reference",
        ),
        (
            (
                "-m", "hydra/sweeper=optuna", "seed=0,1",
                "+hydra.sweeper.sampler_options.n_startup=3",
            ),
            "n_startup",
        ),
        (
            (
                "-m", "hydra/sweeper=optuna", "kl_weight=interval(0,1)",
                "hydra.sweeper.sampler=grid",
            ),
            "sampler=grid",
        ),
        (
            (
                "-m", "hydra/sweeper=optuna", "seed=0,1", "hydra.sweeper.pruner=median",
                "eval.every=0",
            ),
            "eval.every",
        ),
        (
            (
                "-m", "hydra/sweeper=optuna", "seed=0,1",
                "hydra.sweeper.objectives={eval/acuracy: maximize}",
            ),
            "did you mean eval/accuracy",
        ),
        (
            (
                "-m", "hydra/sweeper=optuna", "seed=0,1", "hydra.sweeper.pruner=median",
                "hydra.sweeper.objectives={eval/accuracy: maximize, kl/mean: minimize}",
            ),
            "pruner=median",
        ),
        (
            (
                "-m", "hydra/sweeper=optuna", "seed=0,1",
                "hydra.sweeper.objectives={eval/accuracy: most}",
            ),
            "maximize or minimize",
        ),
        (
            (
                "-m", "hydra/sweeper=optuna", "seed=0,1",
                "hydra.sweeper.storage='sqlite:////nowhere/at/all.db'",
            ),
            "hydra.sweeper.storage=sqlite:////nowhere/at/all.db: can't be opened",
        ),
        (
            (
                "-m", "hydra/sweeper=optuna", "seed=0,1",
                "hydra.sweeper.storage='nodb://here'",
            ),
            "hydra.sweeper.storage=nodb://here",
        ),
    ],
)  # fmt: skip
def test_a_sweep_that_cant_be_is_refused(
    grpo: Grpo, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    """The message is one line, the exit code is 2, and no files are left."""
    code, printed = grpo(*arguments, "tracking=none")
    assert code == 2, printed
    assert says in printed
    assert len(printed.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.json*"))


def test_two_sweeps_dont_share_a_folder(grpo: Grpo, tmp_path: Path) -> None:
    assert grpo("-m", *TWO_STEPS, "max_steps=1", "seed=0,1", "sweep_dir=sweep")[0] == 0
    before = (tmp_path / "sweep/sweep.json").read_bytes()
    for other in (("kl_weight=0,0.1",), ("hydra/sweeper=optuna", "kl_weight=interval(0,1)")):
        code, printed = grpo("-m", *TWO_STEPS, *other, "sweep_dir=sweep")
        assert code == 2
        assert "another sweep" in printed
    assert (tmp_path / "sweep/sweep.json").read_bytes() == before


@pytest.mark.slow
def test_two_processes_dont_run_one_grid(grpo: Grpo, tmp_path: Path) -> None:
    process = start_grpo(tmp_path, *GRID, "sweep_dir=sweep")
    wait_for_step(tmp_path / "sweep/0", 1, process)
    code, printed = grpo("-m", "sweep_dir=sweep")
    process.kill()
    process.wait()
    assert code == 2
    assert "another process is running in this folder" in printed


@pytest.mark.slow
def test_a_job_that_another_process_goes_on_with_is_left_to_it(grpo: Grpo, tmp_path: Path) -> None:
    """That job's folder is not written to; the other jobs run."""
    assert grpo("-m", *TWO_STEPS, "max_steps=1", "seed=0,1", "sweep_dir=sweep")[0] == 0
    for number in "01":
        file = tmp_path / "sweep" / number / "summary.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "status": "interrupted"}))
    before = (tmp_path / "sweep/0/summary.json").read_bytes()
    with locked(tmp_path / "sweep/0"):
        code, printed = grpo("-m", "sweep_dir=sweep")
    assert code == 1, printed
    assert "another process is running in this folder" in printed
    assert (tmp_path / "sweep/0/summary.json").read_bytes() == before
    assert list_statuses(tmp_path / "sweep") == ["interrupted", "finished"]


def test_jobs_are_told_apart_however_they_are_written() -> None:
    from grpo.sweep.folder import Record

    record = Record([], None, [["a=1", "b=2"], ["a=1", "b=3"]])
    assert number_jobs(record, [["b=3", "a=1"], ["b=4", "a=1"], ["b=2", "a=1"]], Path()) == [
        ["a=1", "b=2"], ["a=1", "b=3"], ["b=4", "a=1"],
    ]  # fmt: skip


def test_a_whole_study_is_a_file(grpo: Grpo, tmp_path: Path) -> None:
    """sweep=kl_grid needs no -m; other overrides win over the file."""
    code, printed = grpo(
        "sweep=kl_grid", *TWO_STEPS, "max_steps=1", "seed=0", "num_generation=4", "sweep_dir=sweep"
    )
    assert code == 0, printed
    assert list_statuses(tmp_path / "sweep") == ["finished"] * 3


def test_what_a_study_fixes_is_fixed(grpo: Grpo) -> None:
    """It wins over the config and an experiment; only the command line wins over it."""
    for overrides, expected in (((), 1.0), (("eval.temperature=0.5",), 0.5)):
        code, printed = grpo(
            "sweep=search", "experiment=smoke", "temperature=1.3", *overrides, "--cfg", "job"
        )
        assert code == 0
        assert f"  temperature: {expected}\n" in printed


@pytest.mark.slow
def test_each_job_is_a_wandb_run_of_the_sweeps_group(grpo: Grpo, tmp_path: Path) -> None:
    job = [o for o in TWO_STEPS if o != "tracking=none"]
    assert grpo("-m", *job, "max_steps=1", "seed=0,1", "sweep_dir=my_sweep")[0] == 0
    for number in "01":
        (offline,) = (tmp_path / "my_sweep" / number / "wandb").glob("offline-run-*")
        read = subprocess.run(
            [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(offline)],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert "my_sweep" in read
        assert f"smoke-{number}" in read
