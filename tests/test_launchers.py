"""A sweep's jobs at the same time, each in its own process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import joblib
import pytest

from grpo.errors import ConfigError
from grpo.sweep import gpus
from tests.conftest import read_metrics, read_summary, run_grpo, wait_for_step
from tests.test_sweep import QUICK, TWO_STEPS, is_saved_where_it_stopped, list_statuses

JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
LONGER = (
    "-m", *QUICK, *JOBLIB, "max_steps=30", "checkpoint.every=0", "eval.every=0", "seed=0,1,2",
)  # fmt: skip


@pytest.mark.slow
def test_joblib_runs_two_at_once_and_stops_in_order(tmp_path: Path) -> None:
    """Each has half of the threads. After Ctrl-C in a terminal both save; the third waits."""
    free = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "grpo", *LONGER, "sweep_dir=sweep"],
            cwd=tmp_path, stdout=log, stderr=log, env=free, start_new_session=True,
        )  # fmt: skip
    sweep = tmp_path / "sweep"
    for number in "01":
        wait_for_step(sweep / number, 2, process)  # type: ignore[arg-type]
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130, (tmp_path / "log").read_text()
    assert list_statuses(sweep) == ["interrupted", "interrupted", "none"]
    assert all(is_saved_where_it_stopped(sweep / number) for number in "01")
    threads = max(1, joblib.cpu_count() // 2)
    assert f" {threads} thread" in read_summary(sweep / "0")["device"]

    done = run_grpo("-m", "sweep_dir=sweep", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list_statuses(sweep) == ["finished"] * 3
    assert [line["step"] for line in read_metrics(sweep / "0")] == list(range(31))
    assert not list(sweep.glob(".stop*"))


REWARDS = """
import os, signal
def picky(samples, limit):
    if limit == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if limit == 2:
        raise ValueError("no more of this")
    return [1.0 for _ in samples]
"""


SUBMITIT = ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [JOBLIB, SUBMITIT], ids=["joblib", "submitit"])
def test_a_worker_that_dies_costs_its_own_job_alone(
    launcher: tuple[str, ...], tmp_path: Path
) -> None:
    """At most the job that runs at the same time fails too; other workers run the rest."""
    (tmp_path / "my_rewards_of_workers.py").write_text(REWARDS)
    done = run_grpo(
        "-m", *TWO_STEPS, *launcher,
        "+reward.picky._target_=my_rewards_of_workers.picky",
        "+reward.picky.weight=1", "+reward.picky.limit=0,1,2,3", "sweep_dir=sweep", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert list_statuses(tmp_path / "sweep")[1:] == ["killed", "failed", "finished"], done.stderr
    assert "job 1: ended from outside" in done.stderr
    assert "no more of this" in done.stderr


@pytest.mark.slow
def test_each_process_takes_a_gpu_of_its_own(tmp_path: Path) -> None:
    """No GPU is needed to test which process sees which GPU."""
    done = subprocess.run(
        [sys.executable, "-m", "grpo", "-m", *TWO_STEPS, *JOBLIB, "device=cpu", "seed=0,1",
         "sweep_dir=sweep"],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "3,GPU-a1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"on GPU (\S+)", done.stdout)) == ["3", "GPU-a1"]


def test_more_jobs_than_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = (
        "import sys, time; from pathlib import Path; from grpo.sweep.gpus import take_gpus\n"
        "print(take_gpus(Path(sys.argv[1])), flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1"}
    processes = []
    try:
        for expected in ("0", "1"):
            process = subprocess.Popen(
                [sys.executable, "-c", holder, str(tmp_path)], env=environment,
                stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            processes.append(process)
            assert process.stdout is not None
            assert process.stdout.readline().strip() == expected
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        with pytest.raises(ConfigError, match=r"more jobs at once than there are GPUs \(2\)"):
            gpus.take_gpus(tmp_path)
        processes[0].kill()
        processes[0].wait()
        assert gpus.take_gpus(tmp_path) == "0"  # the process that died released it
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    finally:
        gpus.lock_gpus.cache_clear()
        for process in processes:
            process.kill()
            process.communicate()


def test_one_gpu_needs_no_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for named in ("", "0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        assert gpus.take_gpus(tmp_path) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_submitit_queues_a_job_again_that_runs_out_of_time(tmp_path: Path) -> None:
    """As with SLURM: a signal before the end, then the same job again from its checkpoint."""
    pytest.importorskip("submitit")
    job = (*QUICK, "max_steps=20", "checkpoint.every=2", "eval.every=0")
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo", "-m", *job, *SUBMITIT, "seed=0,1", "sweep_dir=sweep"],
        cwd=tmp_path, stdout=(tmp_path / "log").open("wb"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    sweep = tmp_path / "sweep"
    wait_for_step(sweep / "0", 5, process)  # type: ignore[arg-type]
    os.kill(find_worker(sweep / "0"), signal.SIGUSR2)
    assert process.wait(240) == 0, (tmp_path / "log").read_text()
    assert list_statuses(sweep) == ["finished", "finished"]
    whole = run_grpo(*job, "seed=0", "hydra.run.dir=whole", cwd=tmp_path)
    assert whole.returncode == 0
    assert read_metrics(sweep / "0") == read_metrics(tmp_path / "whole")


def find_worker(run: Path) -> int:
    """Returns the id of the process that locks a run's folder."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                open_files = [os.readlink(file) for file in (process / "fd").iterdir()]
            except OSError:
                continue
            if str(run / "metrics.jsonl") in open_files:
                return int(process.name)
    raise AssertionError("no process has it open")


def test_a_slurm_job_is_composed(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    done = run_grpo(
        "hydra/launcher=slurm", "hydra.launcher.partition=a100", "--cfg", "hydra",
        "-p", "hydra.launcher", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for line in (
        "_target_: hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
        "partition: a100", "max_num_timeout: 20", "gpus_per_node: 1", "timeout_min: 240",
    ):  # fmt: skip
        assert line in done.stdout
