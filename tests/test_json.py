"""What scripts rely on: --json, exit codes, grpo check and grpo runs; a study driven by them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from grpo.cli.outcome import SCHEMA
from tests.conftest import run_grpo

Answer = Callable[..., dict[str, Any]]
Grpo = Callable[..., tuple[int, str]]
PAGE = (Path(__file__).parents[1] / "docs/reference/json.md").read_text()
QUICK = ("experiment=smoke", "tracking=none", "eval.samples=1", "dataset.eval_slice=:8")


@pytest.fixture
def answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Answer:
    """Runs `grpo … --json` in this process and an empty folder: the object that it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> dict[str, Any]:
        from grpo.cli.main import main

        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["grpo", *arguments, "--json"])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return read_answer(capfd.readouterr().out, end.value.code)

    return run


def read_answer(printed: str, code: Any) -> dict[str, Any]:
    """The one line of standard output, whose exit code is the process's."""
    assert printed.count("\n") == 1, printed
    content: dict[str, Any] = json.loads(printed)
    assert content["schema"] == SCHEMA
    assert content["exit_code"] == code
    return content


# The page names every field, and no other.


def read_page(heading: str) -> set[str]:
    """The fields in the tables below a heading."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))


def list_fields(value: Any, known: set[str], prefix: str = "") -> Iterator[str]:
    """Each field's path; `[]` for the elements of a list, NAME for any name in a mapping."""
    if value in ([], {}):
        yield prefix
    elif isinstance(value, list) and any(name.startswith(f"{prefix}[]") for name in known):
        for element in value:
            yield from list_fields(element, known, f"{prefix}[]")
    elif isinstance(value, Mapping) and (
        not prefix or any(name.startswith(f"{prefix}.") for name in known)
    ):
        free = any(name.startswith(f"{prefix}.NAME") for name in known)
        for name, element in value.items():
            path = "NAME" if free else name
            yield from list_fields(element, known, f"{prefix}.{path}" if prefix else path)
    else:
        yield prefix


def check_page(heading: str, *objects: Mapping[str, Any], brief: bool = False) -> None:
    """brief: those that a note of the page leaves out are not there."""
    known = read_page(heading)
    found = {path for content in objects for path in list_fields(content, known)}
    reached = {path.removesuffix("[]") for path in found}
    assert {path for path in found - known if not is_above(path, known)} == set()
    if not brief:
        left = {path for path in known - found if not is_above(path, found)}
        assert {path for path in left if not is_below(path, reached)} == set()


def is_above(path: str, known: set[str]) -> bool:
    """Whether it is an object, or a list of objects, of which fields are known."""
    return any(name.startswith((f"{path}.", f"{path}[]")) for name in known)


def is_below(path: str, found: set[str]) -> bool:
    return any(path.startswith((f"{name}.", f"{name}[]")) for name in found)


# Refusals.

REFUSALS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "wrong key": (["kl_wieght=0.1"], {"key": "kl_wieght", "nearest": ["kl_weight"]}),
    "another tool's key": (["beta=0.1"], {"key": "beta", "nearest": ["kl_weight"]}),
    "wrong choice": (["model=tinny"], {"key": "model", "value": "tinny", "nearest": ["tiny"]}),
    "wrong name": (
        ["optim.schedule=cosin"],
        {
            "key": "optim.schedule", "value": "cosin", "nearest": ["cosine"],
            "choices": ["constant", "linear", "cosine"],
        },
    ),
    "out of range": (["batch_size=0"], {"key": "batch_size", "value": 0}),
    "wrong type": (["batch_size=many"], {"key": "batch_size", "value": "many"}),
    "not set": (["dataset=reasoning_gym"], {"key": "dataset.task"}),
    "no file": (
        ["dataset=jsonl", "dataset.path=nope.jsonl"],
        {"key": "dataset.path", "value": "nope.jsonl"},
    ),
    "no model": (
        ["model=local", "model.path=nowhere"],
        {"key": "model.path", "value": "nowhere"},
    ),
    "no run": (["resume=nowhere"], {"key": "resume", "value": "nowhere"}),
    "no checkpoint": (["eval", "checkpoint=a/b/c"], {"key": "checkpoint", "value": "a/b/c"}),
    "wrong job": (["trian"], {"value": "trian", "nearest": ["train"]}),
    "in a job of a sweep": (
        ["-m", "batch_size=0,1"],
        {"key": "batch_size", "value": 0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_names_key_value_and_what_is_right(
    case: str, answer: Answer, tmp_path: Path
) -> None:
    arguments, says = REFUSALS[case]
    found = answer(*arguments)
    assert (found["status"], found["exit_code"]) == ("refused", 2)
    assert found["error"]["message"]
    assert {key: found["error"][key] for key in says} == says
    assert set(found) == {"schema", "command", "status", "exit_code", "error"}
    check_page("Every object", found)
    assert not list(tmp_path.glob("outputs/*/*"))


def test_the_command_is_named(answer: Answer) -> None:
    words = {"train": ["x=1"], "eval": ["eval", "x=1"], "sweep": ["-m", "x=1,2"]}
    words |= {"check": ["check", "x=1"], "report": ["report"], "export": ["export"]}
    for command, arguments in words.items():
        assert answer(*arguments)["command"] == command
    assert answer("trian")["command"] is None


@pytest.mark.parametrize("arguments", [("chat", "x"), ("dashboard",), ("--cfg", "job")])
def test_json_is_refused_where_there_is_none(arguments: tuple[str, ...], answer: Answer) -> None:
    assert "--json" in answer(*arguments)["error"]["message"]


def test_the_exit_codes_are_in_the_help(grpo: Grpo) -> None:
    code, printed = grpo("--help")
    assert code == 0
    for meaning in ("0 done", "1 failed", "2 refused", "130 interrupted"):
        assert re.search(meaning.replace(" ", r"\s+"), printed)


# grpo check.


def test_a_check_says_what_a_run_would_do(answer: Answer, tmp_path: Path) -> None:
    found = answer("check", *QUICK, "num_epochs=3", "max_steps=5", "algorithm=rloo")
    plan = found["check"]
    assert (found["status"], plan["kind"]) == ("done", "run")
    assert plan["model"]["name"] == "tiny"
    assert plan["model"]["parameters"] == plan["trained_parameters"] == 1_686_528
    assert plan["dataset"] == {
        "name": "arithmetic", "training_rows": 1600, "evaluation_rows": 8,
        "training_prompts": 1600, "evaluation_prompts": 8,
    }  # fmt: skip
    assert plan["kl"] == {"estimator": "k1", "weight": 0.03, "within": "reward", "target": None}
    assert (plan["steps"], plan["completions"]) == (5, 5 * 4 * 4)
    assert plan["memory_gb_at_least"] < plan["memory_gb_here"]
    assert plan["ignored"] == [
        "num_epochs=3 does nothing here: max_steps says how long this run is."
    ]
    check_page("A planned run", plan)
    assert list(tmp_path.iterdir()) == []


def test_a_check_of_a_sweep_names_its_jobs(answer: Answer, tmp_path: Path) -> None:
    plan = answer("check", "-m", *QUICK, "kl_weight=0,0.1", "seed=0,1,2", "sweep_dir=sw")["check"]
    assert (plan["kind"], plan["jobs"], plan["jobs_left"]) == ("grid", 6, 6)
    assert [job[-2:] for job in plan["first_jobs"][:2]] == [
        ["kl_weight=0", "seed=0"], ["kl_weight=0", "seed=1"],
    ]  # fmt: skip
    assert plan["objectives"] == {"eval/sampled_accuracy": "maximize"}
    assert plan["first_job"]["folder"] == "sw/0"
    check_page("A planned sweep", plan)
    search = answer(
        "check", "-m", *QUICK, "hydra/sweeper=optuna", "kl_weight=interval(0,0.1)"
    )["check"]  # fmt: skip
    assert (search["kind"], search["jobs"]) == ("search", 20)
    assert search["space"] == {"kl_weight": "0 to 0.1"}
    check_page("A planned sweep", search)
    assert list(tmp_path.iterdir()) == []


def test_a_check_is_read_in_lines_too(grpo: Grpo) -> None:
    code, printed = grpo("check", *QUICK)
    assert code == 0
    assert "model:     tiny, 1.7 million parameters" in printed
    assert "KL k3 of weight 0.02 in the loss" in printed


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("reward.answer._target_=no.where", "reward.answer._target_"),
        ("device.memory_gb=0.1", "device.memory_gb"),
        ("hydra.run.dir=/proc/run", "hydra.run.dir"),
    ],
)
def test_a_check_refuses_what_a_run_would(override: str, key: str, answer: Answer) -> None:
    found = answer("check", *QUICK, override)
    assert (found["exit_code"], found["error"]["key"]) == (2, key)


# grpo runs and grpo report.


def test_the_runs_that_are_there_say_what_to_do_next(
    short_run: Path, answer: Answer, tmp_path: Path
) -> None:
    for name, status in (("a", "finished"), ("b b", "interrupted"), ("c", "running")):
        run = tmp_path / "outputs" / name
        shutil.copytree(short_run, run, symlinks=True)
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps({**summary, "status": status}))
    shutil.rmtree(tmp_path / "outputs/c/checkpoints")
    found = answer("runs")["outputs"]
    check_page("A folder of outputs", found)
    check_page("A run", *found["runs"], brief=True)
    runs = {run["folder"]: (run["status"], run["next"][0]) for run in found["runs"]}
    assert runs == {
        "outputs/a": ("finished", "grpo eval checkpoint=outputs/a eval.samples=16"),
        "outputs/b b": ("interrupted", "grpo 'resume=outputs/b b'"),
        "outputs/c": (
            "killed", "grpo experiment=smoke tracking=none max_steps=6 log_prompts=4",
        ),
    }  # fmt: skip
    assert answer("runs", "outputs/a")["outputs"]["runs"][0]["steps"] == 6


def test_no_runs_are_none(answer: Answer, grpo: Grpo) -> None:
    assert answer("runs")["outputs"]["runs"] == []
    assert grpo("runs") == (0, "outputs: holds no run, evaluation or sweep yet.\n")
    assert answer("runs", "nowhere")["exit_code"] == 2


def test_a_report_says_what_it_is_of(short_run: Path, answer: Answer, tmp_path: Path) -> None:
    shutil.copytree(short_run, tmp_path / "run", symlinks=True)
    found = answer("report", "run")
    assert found["report"] == "run/report.html"
    check_page("A run", *found["runs"])


# What ends badly.


def test_a_failure_is_an_object_too(
    answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_reward.py").write_text("def fail(samples):\n    raise ValueError('no')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = "+reward.own._target_=failing_reward.fail"
    found = answer(*QUICK, reward, "max_steps=1", "hydra.run.dir=run")
    assert (found["status"], found["exit_code"]) == ("failed", 1)
    assert "reward.own" in found["error"]["message"]
    assert found["run"]["status"] == "failed"
    assert found["run"]["error"] == found["error"]["message"]


def test_a_fault_is_an_object_too(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The traceback goes to standard error."""

    def fail(root: Path) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("grpo.commands.runs.find_outputs", fail)
    found = answer("runs")
    assert (found["status"], found["exit_code"]) == ("failed", 1)
    assert found["error"]["message"] == "RuntimeError: broken"


# A whole study, by these alone.


@pytest.mark.slow
def test_a_study_is_driven_by_json_alone(tmp_path: Path) -> None:
    def ask(*arguments: str) -> dict[str, Any]:
        done = run_grpo(*arguments, "--json", cwd=tmp_path)
        found = read_answer(done.stdout, done.returncode)
        assert found["status"] == "done", done.stderr
        return found

    settings = (*QUICK, "max_steps=2")
    plan = ask("check", *settings, "hydra.run.dir=outputs/first")["check"]
    first = ask(*settings, f"hydra.run.dir={plan['folder']}")["run"]
    check_page("A run", first)
    assert first["steps"] == plan["steps"]
    value = first["objective"]["value"]
    assert value == first["last_evaluation"][first["objective"]["name"]]
    evaluation = ask(*first["next"][0].split()[1:], "hydra.run.dir=outputs/evaluation")
    check_page("An evaluation", evaluation["evaluation"])
    jobs = ("kl_weight=0,0.1", "learning_rate=1e-4,1e-3", "sweep_dir=outputs/sweep")
    assert ask("check", "-m", *settings, *jobs)["check"]["jobs_left"] == 4
    sweep = ask("-m", *settings, *jobs)["sweep"]
    check_page("A sweep", sweep)
    best = max(sweep["jobs"], key=lambda job: job["objective"]["eval/sampled_accuracy"])
    assert sweep["best"]["objective"] == best["objective"]
    assert ask("check", "-m", *settings, *jobs)["check"]["jobs_left"] == 0
    listed = ask("runs")["outputs"]
    check_page("A sweep", *listed["sweeps"], brief=True)
    assert [run["folder"] for run in listed["runs"]] == ["outputs/first"]
    assert ask("report", "outputs/sweep")["sweeps"][0]["settings"] == sweep["settings"]
    exported = ask("export", sweep["best"]["folder"], "model")["export"]
    check_page("An exported model", exported)
    assert (tmp_path / "model/config.json").is_file()


@pytest.mark.slow
def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path) -> None:
    import signal
    import time

    command = [sys.executable, "-m", "grpo", *QUICK, "max_steps=500", "hydra.run.dir=run", "--json"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (tmp_path / "run/checkpoints/latest").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    found = read_answer(printed, process.returncode)
    assert (found["status"], found["exit_code"]) == ("interrupted", 130)
    assert found["run"]["next"] == ["grpo resume=run"]
