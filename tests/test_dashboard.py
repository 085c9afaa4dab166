"""`grpo dashboard` as a separate process, queried over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from grpo.dashboard.outputs import find_outputs
from grpo.dashboard.studies import copy_trials
from tests.conftest import make_once, run_grpo

Grpo = Callable[..., tuple[int, str]]
JOB = ("experiment=smoke", "max_steps=2", "dataset.eval_slice=:16")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in Trackio, its evaluation, and a search of two trials, in their usual folders."""

    def make(cwd: Path) -> None:
        for command in (
            (*JOB, "tracking=trackio", "hydra.run.dir=outputs/day/run"),
            ("eval", "checkpoint=outputs/day/run", "hydra.run.dir=outputs/day/eval"),
            (
                "-m", *JOB, "tracking=none", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2",
                "learning_rate=tag(log,interval(1e-4,1e-3))", "sweep_dir=outputs/sweeps/day/search",
            ),
        ):  # fmt: skip
            done = run_grpo(*command, cwd=cwd)
            assert done.returncode == 0, done.stderr

    made = make_once(tmp_path_factory, "dashboard", make) / "outputs"
    # This process's own: reading Trackio's databases leaves files beside them.
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("shown") / "outputs", symlinks=True))


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[str]:
    """Serves a dashboard of this folder; yields its address, and ends it with Ctrl-C."""
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo", "dashboard", str(folder), "--port=0", *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        yield next(word for word in line.split() if word.startswith("http://")).rstrip("/")
    finally:
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=30)
    assert process.returncode in (0, 130), rest
    assert "Traceback" not in rest
    assert "DeprecationWarning" not in rest


@pytest.fixture(scope="module")
def address(outputs: Path) -> Iterator[str]:
    with serving(outputs) as url:
        yield url


def ask(address: str, method: str = "GET", host: str = "", body: str = "") -> tuple[int, str]:
    headers = ({"Host": host} if host else {}) | (
        {"Content-Type": "application/json"} if body else {}
    )
    request = urllib.request.Request(address, body.encode() or None, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_home_names_what_there_is(address: str) -> None:
    code, page = ask(address)
    assert code == 200
    assert "1 run, 1 sweep; nothing runs just now." in page
    assert "href='/run/day/run'" in page
    assert "href='/sweep/sweeps/day/search'" in page
    assert "2 finished" in page


def test_an_evaluation_is_beside_the_runs(outputs: Path, address: str) -> None:
    """The home page shows its result, and Trackio shows it next to its run."""
    page = ask(address)[1]
    found = json.loads((outputs / "day/eval/evaluation.json").read_text())
    row = page[page.index("<td>day/eval</td>") :].partition("</tr>")[0]
    assert "<td>outputs/day/run</td><td>16</td>" in row
    assert f"<td>{found['eval/sampled_accuracy']:.1%}</td>" in row
    body = json.dumps({"project": "grpo-bench"})
    _, answer = ask(f"{address}/trackio/api/get_runs_for_project", "POST", body=body)
    assert "eval-smoke" in answer, answer


def test_reports_are_pages_and_made_anew_where_they_are_old(outputs: Path, address: str) -> None:
    run = outputs / "day/run"
    written = (run / "report.html").read_text()
    assert ask(f"{address}/run/day/run") == (200, written)
    (run / "report.html").unlink()
    before = {file: file.stat().st_mtime_ns for file in outputs.rglob("*")}
    with ThreadPoolExecutor(48) as many:
        answers = set(many.map(ask, [f"{address}/run/day/run"] * 48))
    assert answers == {(200, written)}
    os.utime(outputs / "sweeps/day/search/sweep.json")
    code, page = ask(f"{address}/sweep/sweeps/day/search")
    assert {file: file.stat().st_mtime_ns for file in outputs.rglob("*")} == before | {
        file: file.stat().st_mtime_ns for file in (outputs / "sweeps/day/search/sweep.json",)
    }  # the dashboard is read-only
    (run / "report.html").write_text(written)
    assert code == 200
    assert "learning_rate" in page
    assert ask(f"{address}/run/sweeps/day/search/1")[0] == 200  # a job is a run


def test_trackio_and_optuna_are_there(address: str) -> None:
    assert "Trackio" in ask(f"{address}/trackio/")[1]
    code, answer = ask(f"{address}/trackio/api/get_all_projects", "POST")
    assert code == 200
    assert "grpo-bench" in answer
    assert "Optuna" in ask(f"{address}/dashboard")[1]
    (study,) = json.loads(ask(f"{address}/api/studies")[1])["study_summaries"]
    assert study["study_name"] == "sweeps/day/search"
    detail = json.loads(ask(f"{address}/api/studies/{study['study_id']}?after=0")[1])
    assert [trial["state"] for trial in detail["trials"]] == ["Complete", "Complete"]


@pytest.mark.parametrize(
    ("path", "method", "code"),
    [
        ("/run/nowhere", "GET", 404),
        ("/run/%2e%2e/%2e%2e", "GET", 404),
        ("/run/..%2f..%2f..%2fetc", "GET", 404),
        ("/run/day", "GET", 404),  # no run
        ("/api/studies/0", "DELETE", 405),
        ("/api/studies", "POST", 405),
    ],
)
def test_nothing_else_is_shown_or_changed(address: str, path: str, method: str, code: int) -> None:
    assert ask(address + path, method)[0] == code


@pytest.mark.parametrize("name", ["delete_run", "force_sync", "bulk_log", "upload"])
def test_trackio_is_not_written_through_it(name: str, address: str, outputs: Path) -> None:
    files = {file for file in (outputs / "trackio").rglob("*") if file.suffix == ".parquet"}
    assert ask(f"{address}/trackio/api/{name}", "POST") == (405, "This dashboard is read-only.")
    assert files == {f for f in (outputs / "trackio").rglob("*") if f.suffix == ".parquet"}


def test_it_answers_to_names_of_this_machine_alone(address: str) -> None:
    assert ask(address, host="evil.example")[0] == 400
    assert ask(address, host="localhost")[0] == 200


def test_a_new_run_is_seen_and_an_empty_folder_is_no_error(short_run: Path, tmp_path: Path) -> None:
    with serving(tmp_path) as url:
        assert "0 runs, 0 sweeps" in ask(url)[1]
        (tmp_path / "later").symlink_to(short_run)
        assert ask(f"{url}/run/later")[0] == 404  # it is in another folder
        (tmp_path / "later").unlink()
        shutil.copytree(short_run, tmp_path / "later", symlinks=True)
        assert "1 run, 0 sweeps" in ask(url)[1]


def test_an_evaluation_that_is_half_written_is_told_and_hides_no_other(tmp_path: Path) -> None:
    for name, text in (("torn", '{"checkpoint": "run", "eval/ac'), ("whole", '{"prompts": 3}')):
        (tmp_path / name / ".hydra").mkdir(parents=True)
        (tmp_path / name / ".hydra/config.yaml").write_text("{}")
        (tmp_path / name / "evaluation.json").write_text(text)
    found = find_outputs(tmp_path)
    assert [evaluation.folder.name for evaluation in found.evaluations] == ["whole"]
    assert [error for error in found.errors if "torn/evaluation.json: can't be read" in error]


def test_what_is_broken_hides_nothing_else(outputs: Path, tmp_path: Path) -> None:
    shutil.copytree(outputs, tmp_path / "outputs", symlinks=True)
    for name, file in (("odd", "study.json"), ("torn", "sweep.json"), ("gone", "study.journal")):
        shutil.copytree(outputs / "sweeps/day/search", tmp_path / "outputs/sweeps" / name)
        (tmp_path / "outputs/sweeps" / name / file).write_text('{"other": 1}')
    with serving(tmp_path / "outputs") as url:
        code, page = ask(url)
        assert code == 200
        assert "href='/run/day/run'" in page
        assert "href='/sweep/sweeps/odd'" in page
        assert "href='/sweep/sweeps/torn'" not in page
        assert "sweeps/torn/sweep.json: can&#39;t be read" in page
        assert page.count("<td>can't be read: ") == 2  # the studies of odd and gone
        names = [
            s["study_name"] for s in json.loads(ask(f"{url}/api/studies")[1])["study_summaries"]
        ]
        assert "sweeps/day/search" in names


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere",), "no such folder"),
        ((".", "--port", "http"), "--port http"),
        ((".", "--port", "99999"), "--port 99999"),
        ((".", "--port"), "--port needs a value"),
        ((".", "--host="), "--host needs a value"),
        ((".", "--host", "203.0.113.1"), "can't listen"),
        ((".", "."), "grpo dashboard [FOLDER]"),
        (("--hots", "x"), "grpo dashboard [FOLDER]"),
    ],
)
def test_what_it_cant_do(arguments: tuple[str, ...], says: str, grpo: Grpo) -> None:
    code, printed = grpo("dashboard", *arguments)
    assert code == 2
    assert says in printed
    assert "Traceback" not in printed


def test_a_port_that_is_taken_is_refused(grpo: Grpo) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, printed = grpo("dashboard", ".", "--port", str(port))
    assert code == 2
    assert f"--port {port}" in printed


def test_a_studys_copy_follows_it() -> None:
    """Whatever happened to the trials since the last copy."""
    study, copy = optuna.create_study(direction="maximize"), InMemoryStorage()
    copy_id = copy.create_new_study(study.directions, "copy")

    def check_copy() -> None:
        copy_trials(copy, copy_id, study.trials)

        def list_trials(trials: list[optuna.trial.FrozenTrial]) -> list[Any]:
            return [
                (t.number, t.state, t.params, t.values, t.intermediate_values, t.user_attrs)
                for t in trials
            ]

        assert list_trials(copy.get_all_trials(copy_id)) == list_trials(study.trials)

    check_copy()
    study.enqueue_trial({"x": 0.5})
    check_copy()
    first = study.ask()
    check_copy()
    first.suggest_float("x", 0, 1)
    first.report(0.1, 1)
    check_copy()
    second = study.ask({"x": FloatDistribution(0, 1)})
    first.report(0.2, 2)
    first.set_user_attr("folder", "a")
    check_copy()
    study.tell(first, 0.7)
    study.tell(second, state=TrialState.PRUNED)
    check_copy()
    study.tell(study.ask(), state=TrialState.FAIL)
    check_copy()
    assert [t.state for t in copy.get_all_trials(copy_id)] == [
        TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL,
    ]  # fmt: skip
