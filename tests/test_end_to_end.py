"""Whole runs, as a user starts them, and what they leave."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import make_once, read_lines, run_grpo

Grpo = Callable[..., tuple[int, str]]
ROOT = Path(__file__).parents[1]
STEP_METRICS = {
    "loss/total", "loss/policy", "loss/kl",
    "kl/mean", "kl/k1", "kl/k2", "kl/k3", "kl/weight",
    "reward/mean", "reward/std", "reward/answer", "reward/failed",
    "reward/solved_groups", "reward/unsolved_groups", "reward/zero_variance_groups",
    "policy/entropy", "policy/clip_fraction", "policy/ratio_max",
    "sampler/kl", "sampler/chi2", "sampler/effective_share", "sampler/dropped",
    "sampler/importance_min", "sampler/importance_max",
    "completion/length_mean", "completion/length_max", "completion/truncated",
    "completion/answered", "optim/moved",
    "optim/learning_rate", "optim/grad_norm", "optim/skipped",
    "time/rollout", "time/reward", "time/update", "time/step",
    "perf/completion_tokens_per_second", "perf/samples_per_second", "memory/peak_gb",
}  # fmt: skip
EVAL_METRICS = {
    "eval/reward", "eval/accuracy", "eval/sampled_accuracy", "eval/pass_at_k", "eval/length_mean"
}  # fmt: skip


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One run of experiment=smoke in a process of its own: its folder and what it printed."""

    def make(cwd: Path) -> None:
        result = run_grpo("experiment=smoke", "hydra.run.dir=run", cwd=cwd)
        assert result.returncode == 0, result.stderr
        assert {path.name for path in cwd.iterdir()} == {"run"}  # everything of the run inside it
        (cwd / "printed").write_text(result.stdout + result.stderr)

    cwd = make_once(tmp_path_factory, "smoke", make)
    return cwd / "run", (cwd / "printed").read_text()


def test_a_run_leaves_what_the_contract_says(smoke: tuple[Path, str]) -> None:
    run, _ = smoke
    names = {path.name for path in run.iterdir()}
    assert names == {
        ".hydra", "checkpoints", "completions.jsonl", "evaluations.jsonl", "metrics.jsonl",
        "report.html", "summary.json", "train.log", "wandb",
    }  # fmt: skip
    assert {p.name for p in (run / ".hydra").iterdir()} == {
        "config.yaml", "hydra.yaml", "overrides.yaml"
    }  # fmt: skip
    assert (run / "checkpoints/latest").resolve().name == "step_3"


def test_every_metric_of_the_contract_is_there_each_step(smoke: tuple[Path, str]) -> None:
    run, _ = smoke
    metrics = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [0, 1, 2, 3]
    assert all(next(iter(line)) == "step" for line in metrics)
    evaluated = EVAL_METRICS | {"eval/overlap"}
    assert set(metrics[0]) == {"step"} | evaluated
    assert set(metrics[1]) == {"step"} | STEP_METRICS
    assert set(metrics[2]) == set(metrics[3]) == {"step"} | STEP_METRICS | evaluated
    assert all(math.isfinite(value) for line in metrics for value in line.values())


def test_completions_are_kept_with_what_they_got(smoke: tuple[Path, str]) -> None:
    run, _ = smoke
    rows = read_lines(run / "completions.jsonl")
    assert len(rows) == 3 * 2 * 4  # steps x log_prompts x num_generation
    assert set(rows[0]) == {
        "step", "prompt", "completion", "answer", "reward", "reward/answer", "advantage", "tokens",
        "truncated", "failed", "token_ends", "token_kl",
    }  # fmt: skip
    for row in rows:
        right = f"<answer>{row['answer']}</answer>" in row["completion"]
        assert row["reward"] == row["reward/answer"] == float(right)
    for first in range(0, len(rows), 4):
        assert len({row["prompt"] for row in rows[first : first + 4]}) == 1


def test_the_summary_says_what_became_of_it(smoke: tuple[Path, str]) -> None:
    run, printed = smoke
    summary = json.loads((run / "summary.json").read_text())
    metrics = read_lines(run / "metrics.jsonl")
    assert summary["status"] == "finished"
    assert summary["steps"] == 3
    assert summary["objective"] == {
        "name": "eval/sampled_accuracy",
        "value": metrics[-1]["eval/sampled_accuracy"],
    }
    assert summary["first_evaluation"]["eval/accuracy"] == metrics[0]["eval/accuracy"]
    assert summary["wall_seconds"] > 0
    assert summary["versions"]["torch"].startswith("2.")
    assert "finished: 3 steps" in printed
    assert "run/checkpoints/latest/model" in printed


def test_progress_reads_in_a_pipe(smoke: tuple[Path, str]) -> None:
    _, printed = smoke
    assert "step 3/3  reward " in printed
    assert "tokens/s" in printed
    assert "\x1b" not in printed  # no terminal codes
    assert "Warning" not in printed


def test_wandb_ran_offline_and_holds_the_same_numbers(smoke: tuple[Path, str]) -> None:
    run, printed = smoke
    (offline,) = (run / "wandb").glob("offline-run-*")
    assert f"wandb sync {offline}" in printed
    inspect = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(offline)],
        capture_output=True,
        text=True,
    )
    assert inspect.returncode == 0, inspect.stderr
    logged = inspect.stdout
    last = read_lines(run / "metrics.jsonl")[-1]
    assert "kl/k3" in logged
    assert "eval/sampled_accuracy" in logged
    assert str(last["eval/sampled_accuracy"])[:6] in logged


def test_the_model_loads_in_transformers_by_path(smoke: tuple[Path, str]) -> None:
    run, _ = smoke
    folder = run / "checkpoints/latest/model"
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() <= 4_000_000
    assert AutoTokenizer.from_pretrained(folder).decode([5])


def test_a_trained_model_is_evaluated_by_its_runs_folder(
    smoke: tuple[Path, str], grpo: Grpo, tmp_path: Path
) -> None:
    """The same rows and seeds as in training, so the same figures."""
    run, _ = smoke
    last = read_lines(run / "metrics.jsonl")[-1]
    for checkpoint in (run, run / "checkpoints/step_3", run / "checkpoints/latest/model"):
        code, printed = grpo("eval", f"checkpoint={checkpoint}", "hydra.run.dir=evaluated")
        assert code == 0, printed
        assert re.search(r"all +128 ", printed)
        found = json.loads((tmp_path / "evaluated/evaluation.json").read_text())
        assert {key: found[key] for key in EVAL_METRICS} == {key: last[key] for key in EVAL_METRICS}


@pytest.mark.slow
def test_no_kl_weight_loads_no_reference_and_logs_no_kl(grpo: Grpo, tmp_path: Path) -> None:
    for override in ("kl_weight=0", "kl=none"):
        folder = override.replace("=", "")
        code, printed = grpo(
            "experiment=smoke", override, "max_steps=1", "tracking=none", f"hydra.run.dir={folder}"
        )
        assert code == 0, printed
        last = read_lines(tmp_path / folder / "metrics.jsonl")[-1]
        assert not [name for name in last if name.startswith("kl/")]
        assert last["loss/kl"] == 0.0


def test_a_run_is_not_written_over(smoke: tuple[Path, str], grpo: Grpo) -> None:
    run, _ = smoke
    before = (run / "metrics.jsonl").read_bytes()
    code, printed = grpo("experiment=smoke", f"hydra.run.dir={run}")
    assert code == 2
    assert f"resume={run} continues it" in printed
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_jobs_of_a_sweep_share_nothing(grpo: Grpo, tmp_path: Path) -> None:
    """The second job of a process gives what it gives alone; each is a W&B run of its own."""
    job = ("experiment=smoke", "max_steps=2", "eval.samples=1", "dataset.eval_slice=:16")
    code, printed = grpo("-m", *job, "seed=0,1", "sweep_dir=sweep")
    assert code == 0, printed
    assert grpo(*job, "seed=1", "hydra.run.dir=alone")[0] == 0
    clocks = ("time/", "perf/", "memory/")
    second, alone = (
        [{k: v for k, v in line.items() if not k.startswith(clocks)} for line in read_lines(file)]
        for file in (tmp_path / "sweep/1/metrics.jsonl", tmp_path / "alone/metrics.jsonl")
    )
    assert second == alone
    assert read_lines(tmp_path / "sweep/0/metrics.jsonl")[1]["loss/total"] != alone[1]["loss/total"]
    for number in "01":
        assert len(list((tmp_path / "sweep" / number / "wandb").glob("offline-run-*"))) == 1
    assert not (tmp_path / "outputs").exists()


OWN_REWARD = '''
class Brief:
    """A class with an option."""
    def __init__(self, limit):
        self.limit = limit
    def __call__(self, samples):
        return [float(len(sample.token_ids) <= self.limit) for sample in samples]

def right(samples, bonus):
    """A function with one."""
    return [bonus * sample.example.verify(sample.completion) for sample in samples]
'''


@pytest.mark.slow
def test_a_users_own_config_folder_and_rewards(tmp_path: Path) -> None:
    """As one would: files in the working directory, the installed command's module."""
    (tmp_path / "own_rewards.py").write_text(OWN_REWARD)
    (tmp_path / "conf/reward").mkdir(parents=True)
    (tmp_path / "conf/reward/own.yaml").write_text(
        "brief: {_target_: own_rewards.Brief, limit: 25, weight: 0.5}\n"
        "right: {_target_: own_rewards.right, bonus: 2.0, weight: 1.0}\n"
    )
    result = run_grpo(
        "--config-dir", "conf", "experiment=smoke", "reward=own", "max_steps=1", "tracking=none",
        "hydra.run.dir=run", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    last = read_lines(tmp_path / "run/metrics.jsonl")[-1]
    assert last["reward/mean"] == pytest.approx(0.5 * last["reward/brief"] + last["reward/right"])


def test_a_run_with_config_folder_and_checkpoint_keys_is_evaluated(
    grpo: Grpo, tmp_path: Path
) -> None:
    """Flags that take a value, and keys that mean something else in evaluation."""
    (tmp_path / "own/experiment").mkdir(parents=True)
    (tmp_path / "own/experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults: [smoke]\nmax_steps: 1\ndataset: {digits: 1, eval_size: 9}\n"
    )
    code, printed = grpo(
        "--config-dir", "own", "experiment=mine", "checkpoint.every=1", "tracking=none",
        "dataset.size=50", "hydra.run.dir=run",
    )  # fmt: skip
    assert code == 0, printed
    code, printed = grpo("eval", "checkpoint=run")
    assert code == 0, printed
    assert re.search(r"all +9 ", printed)
    assert grpo("eval", "-m", "checkpoint=run,run")[0] == 2


@pytest.mark.slow
def test_the_default_run_teaches_the_tiny_model_to_add(grpo: Grpo, tmp_path: Path) -> None:
    code, printed = grpo("tracking=none", "hydra.run.dir=run")
    assert code == 0, printed
    metrics = read_lines(tmp_path / "run/metrics.jsonl")
    assert metrics[0]["eval/sampled_accuracy"] <= 0.5
    assert metrics[-1]["eval/sampled_accuracy"] >= 0.9


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_environment_and_an_empty_folder(tmp_path: Path) -> None:
    """The wheel alone is installed; its dependencies are borrowed, being the pinned set itself."""
    wheels = tmp_path / "wheels"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(wheels), str(ROOT)], check=True)
    (wheel,) = wheels.glob("grpo_bench-*.whl")
    assert wheel.stat().st_size < 8e6
    venv.create(tmp_path / "clean", with_pip=True)
    python = tmp_path / "clean/bin/python"
    subprocess.run([python, "-m", "pip", "--quiet", "install", "--no-deps", wheel], check=True)
    (site,) = (tmp_path / "clean/lib").glob("*/site-packages")
    borrowed = Path(pytest.__file__).parents[1]
    (site / "borrowed.pth").write_text(f"{borrowed}\n")

    empty = tmp_path / "empty"
    (empty / "own/experiment").mkdir(parents=True)
    (empty / "own/experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults: [smoke]\nmax_steps: 1\nname: mine\n"
    )
    command = tmp_path / "clean/bin/grpo"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*arguments: str) -> str:
        result = subprocess.run(
            [command, *arguments], cwd=empty, capture_output=True, text=True, env=environment
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    where = subprocess.run(
        [python, "-c", "import grpo; print(grpo.__file__)"],
        cwd=empty, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert str(tmp_path / "clean") in where.stdout  # not the checkout
    run("--config-dir", "own", "experiment=mine", "tracking=none", "hydra.run.dir=run")
    assert json.loads((empty / "run/summary.json").read_text())["status"] == "finished"
    assert "majority@" in run("eval", "checkpoint=run")
