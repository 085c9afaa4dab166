"""Searches by Optuna: spaces, samplers, pruning, storages, and what survives a kill."""

from __future__ import annotations

import getpass
import json
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import TrialState, create_trial

from grpo.errors import ConfigError
from grpo.report.sweep.pareto import pareto_mask
from grpo.report.sweep.ranking import rank_settings
from grpo.report.sweep.read import read_sweeps
from grpo.runs.files import write_json
from grpo.runs.lock import locked
from grpo.sweep.folder import StudyFile
from grpo.sweep.objectives import read_final_values
from grpo.sweep.space import Space, build_space, format_override, list_combinations, list_corners
from grpo.sweep.study import SearchOptions
from tests.conftest import (
    make_once,
    read_metrics,
    read_summary,
    run_grpo,
    start_grpo,
    wait_for_step,
)
from tests.test_sweep import TWO_STEPS, Grpo

SEARCH = ("-m", "hydra/sweeper=optuna", *TWO_STEPS, "kl_weight=interval(0,0.1)")


def load_study(sweep: Path) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(sweep / "study.journal")))
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage)


def build_options(**changes: Any) -> SearchOptions:
    defaults: dict[str, Any] = {
        "n_trials": 20, "n_jobs": 1, "sampler": "tpe", "sampler_options": {}, "pruner": "none",
        "pruner_options": {}, "direction": "maximize", "objectives": None, "storage": None,
        "study_name": None, "seed": 0,
    }  # fmt: skip
    return SearchOptions.from_config({**defaults, **changes})


# Spaces


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("x=interval(0,1)", FloatDistribution(0.0, 1.0)),
        ("x=int(interval(1,9))", IntDistribution(1, 9)),
        ("x=tag(log,interval(1e-6,1e-3))", FloatDistribution(1e-6, 1e-3, log=True)),
        ("x=tag(log,int(interval(1,64)))", IntDistribution(1, 64, log=True)),
        ("x=range(4,17,4)", IntDistribution(4, 16, step=4)),
        ("x=range(4,16,4)", IntDistribution(4, 12, step=4)),  # as in Hydra, the end is excluded
        ("x=range(0,0.5,0.1)", FloatDistribution(0.0, 0.4, step=0.1)),
        ("x=choice(4,8)", CategoricalDistribution([4, 8])),
        ("x=4,8", CategoricalDistribution([4, 8])),
        ("x=k1,k3", CategoricalDistribution(["k1", "k3"])),
        ("x=null,true", CategoricalDistribution([None, True])),
        ("x=[a,b],[c]", CategoricalDistribution(["[a,b]", "[c]"])),
    ],
)
def test_hydras_syntax_is_a_distribution(override: str, expected: BaseDistribution) -> None:
    (parsed,) = OverridesParser.create().parse_overrides([override])
    assert build_space([parsed]) == {"x": expected}


@pytest.mark.parametrize("override", ["x=null,true,k3,[a,b],0.1,7,'a b'", "x={a: 1},{a: 2}"])
def test_a_choice_is_written_as_it_was_read(override: str) -> None:
    parser = OverridesParser.create()
    (parsed,) = parser.parse_overrides([override])
    wanted = [parsed.value() for parsed in parser.parse_overrides(format_values(override))]
    (distribution,) = build_space([parsed]).values()
    assert isinstance(distribution, CategoricalDistribution)
    again = parser.parse_overrides(
        [format_override("x", choice) for choice in distribution.choices]
    )
    assert [override.value() for override in again] == wanted


def format_values(override: str) -> list[str]:
    """Returns an override's values as a grid writes them."""
    (parsed,) = OverridesParser.create().parse_overrides([override])
    return [f"x={value}" for value in parsed.sweep_string_iterator()]


def test_every_combination_once() -> None:
    overrides = OverridesParser.create().parse_overrides(["a=1,2", "b=range(0,0.3,0.1)", "c=4"])
    found = list_combinations(build_space(overrides))
    assert found == [{"a": a, "b": pytest.approx(b)} for a in (1, 2) for b in (0.0, 0.1, 0.2)]


SPACE: dict[str, BaseDistribution] = {
    "a": FloatDistribution(1e-5, 1e-2, log=True),
    "b": IntDistribution(4, 16, step=4),
    "c": CategoricalDistribution(["k1", "k3"]),
}


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes", "random"])
def test_a_sampler_goes_on_where_it_was(sampler: str) -> None:
    """After a restart it proposes the same values, which follow from the earlier trials."""

    def run_trials(study: optuna.Study, trials: int) -> None:
        for _ in range(trials):
            study.sampler = build_options(sampler=sampler).make_sampler(len(study.trials))
            trial = study.ask(SPACE)
            study.tell(trial, trial.params["a"] * 100 + trial.params["b"])

    at_once, in_two = optuna.create_study(), optuna.create_study()
    run_trials(at_once, 14)
    run_trials(in_two, 9)
    run_trials(in_two, 5)
    values = [trial.params for trial in at_once.trials]
    assert values == [trial.params for trial in in_two.trials]
    assert len({str(value) for value in values}) > 10  # and values don't repeat


def test_another_seed_asks_something_else() -> None:
    first = [build_options(seed=seed).make_sampler(0) for seed in (0, 1)]
    studies = [optuna.create_study(sampler=sampler) for sampler in first]
    assert studies[0].ask(SPACE).params != studies[1].ask(SPACE).params


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"hydra.sweeper.n_trails.*did you mean n_trials"):
        build_options(n_trails=4)


# Whole searches


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that runs without interruption."""

    def make(cwd: Path) -> None:
        done = run_grpo(*KILLED, "sweep_dir=x/sweep", cwd=cwd)
        assert done.returncode == 0, done.stderr

    return make_once(tmp_path_factory, "search", make) / "x/sweep"


KILLED = (
    *SEARCH, "max_steps=6", "eval.every=2", "checkpoint.every=2", "hydra.sweeper.n_trials=5",
    "hydra.sweeper.pruner=median", "+hydra.sweeper.pruner_options.n_startup_trials=1",
    "hydra.sweeper.seed=1",
    "learning_rate=tag(log,interval(1e-4,1e-2))", "num_generation=4,8",
)  # fmt: skip


def list_trials(study: optuna.Study) -> list[Any]:
    return [(t.state, t.params, t.values, t.intermediate_values) for t in study.trials]


@pytest.mark.slow
def test_a_search_says_what_its_jobs_came_to(whole: Path) -> None:
    study = load_study(whole)
    assert len(study.trials) == 5
    for trial in study.trials:
        job = whole / str(trial.number)
        evaluations = {
            line["step"]: line["eval/sampled_accuracy"]
            for line in read_metrics(job)
            if line["step"] and "eval/sampled_accuracy" in line
        }
        if trial.state == TrialState.COMPLETE:
            assert read_summary(job)["status"] == "finished"
            assert trial.value == read_summary(job)["objective"]["value"]
            assert trial.value == evaluations[6]
        else:
            assert trial.state == TrialState.PRUNED
            assert read_summary(job)["status"] == "pruned"
            assert read_summary(job)["steps"] == trial.last_step < 6
            assert (job / "checkpoints/latest/model").is_dir()
        assert trial.intermediate_values == evaluations
    assert {t.state for t in study.trials} == {TrialState.COMPLETE, TrialState.PRUNED}


@pytest.mark.slow
def test_hyperband_gives_up_trials_too(grpo: Grpo, tmp_path: Path) -> None:
    """Pruned trials end at an evaluation; the others do all their steps."""
    code, printed = grpo(
        *SEARCH, "max_steps=8", "eval.every=2", "hydra.sweeper.n_trials=8", "sweep_dir=sweep",
        "hydra.sweeper.pruner=hyperband",
        "+hydra.sweeper.pruner_options={min_resource: 2, max_resource: 8, reduction_factor: 2}",
        "learning_rate=tag(log,interval(1e-5,3e-2))",
    )  # fmt: skip
    assert code == 0, printed
    trials = load_study(tmp_path / "sweep").trials
    states = [trial.state for trial in trials]
    assert set(states) == {TrialState.COMPLETE, TrialState.PRUNED}
    for trial in trials:
        steps = read_summary(tmp_path / "sweep" / str(trial.number))["steps"]
        assert steps == (trial.last_step if trial.state == TrialState.PRUNED else 8)


@pytest.mark.slow
def test_a_killed_search_comes_to_the_same(whole: Path, tmp_path: Path) -> None:
    """No trial is lost, doubled or run again, and the other trials are the same."""
    sweep = tmp_path / "x/sweep"
    process = start_grpo(tmp_path, *KILLED, "sweep_dir=x/sweep")
    wait_for_step(sweep / "1", 1, process)
    process.kill()
    process.wait()
    states = [trial.state for trial in load_study(sweep).trials]
    assert states == [TrialState.COMPLETE, TrialState.RUNNING]
    done = run_grpo("-m", "sweep_dir=x/sweep", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list_trials(load_study(sweep)) == list_trials(load_study(whole))
    for number in range(5):
        assert read_metrics(sweep / str(number)) == read_metrics(whole / str(number))


CREATE_TRIAL = 4  # the operation's code in Optuna's journal


@pytest.mark.slow
def test_a_search_killed_before_a_trials_job_comes_to_the_same(whole: Path, tmp_path: Path) -> None:
    """The third trial is only in the study, but with all its values from the beginning."""
    sweep = tmp_path / "x/sweep"
    shutil.copytree(whole, sweep, symlinks=True)
    journal = (sweep / "study.journal").read_text().splitlines(keepends=True)
    trials = [n for n, line in enumerate(journal) if json.loads(line)["op_code"] == CREATE_TRIAL]
    (sweep / "study.journal").write_text("".join(journal[: trials[2] + 1]))
    for number in "234":
        shutil.rmtree(sweep / number)
    assert [len(trial.params) for trial in load_study(sweep).trials] == [3, 3, 3]
    done = run_grpo("-m", "sweep_dir=x/sweep", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list_trials(load_study(sweep)) == list_trials(load_study(whole))


FAILS_ONCE = """
from pathlib import Path
def reward(samples):
    if not Path("mended").exists():
        raise ValueError("no more of this")
    return [1.0 for _ in samples]
"""


@pytest.mark.slow
def test_a_trial_that_failed_is_tried_again_by_the_next_start(grpo: Grpo, tmp_path: Path) -> None:
    """Each start tries it once, from its checkpoint; a trial with a deleted folder runs again."""
    (tmp_path / "fails_once.py").write_text(FAILS_ONCE)
    search = (*SEARCH, "hydra.sweeper.n_trials=2", "sweep_dir=sweep", "max_steps=1")
    reward = ("+reward.own._target_=fails_once.reward", "+reward.own.weight=0.1")
    code, printed = grpo(*search, *reward)
    assert code == 1
    assert "2 of 2 jobs did not end well" in printed
    assert printed.count("\njob 0: ") == printed.count("\njob 1: ") == 1
    (tmp_path / "mended").touch()
    code, printed = grpo("-m", "sweep_dir=sweep")
    assert code == 0, printed
    trials = load_study(tmp_path / "sweep").trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 2
    before = read_metrics(tmp_path / "sweep/1")
    shutil.rmtree(tmp_path / "sweep/1")
    code, printed = grpo("-m", "sweep_dir=sweep")
    assert code == 0, printed
    assert read_metrics(tmp_path / "sweep/1") == before
    again = load_study(tmp_path / "sweep").trials
    assert [(trial.params, trial.values) for trial in again] == [
        (trial.params, trial.values) for trial in trials
    ]


@pytest.mark.slow
def test_a_trial_whose_job_runs_elsewhere_is_left_to_it(
    whole: Path, grpo: Grpo, tmp_path: Path
) -> None:
    sweep = tmp_path / "x/sweep"
    shutil.copytree(whole, sweep, symlinks=True)
    study = load_study(sweep)
    first, file = study.trials[0], StudyFile.read(sweep)
    assert file is not None
    study.add_trial(
        create_trial(
            state=TrialState.RUNNING, params=first.params, distributions=first.distributions,
            user_attrs={"folder": file.folder},
        )
    )  # fmt: skip
    (sweep / "5").mkdir()
    (sweep / "5/summary.json").write_text('{"status": "running"}')
    with locked(sweep / "5"):
        code, printed = grpo("-m", "sweep_dir=x/sweep", "hydra.sweeper.n_trials=7")
    assert code == 0, printed
    assert "1 running" in printed.rpartition("sweep in")[2]
    states = [trial.state for trial in load_study(sweep).trials]
    assert states[5] == TrialState.RUNNING
    assert states[6].is_finished()


def test_n_trials_is_the_total(whole: Path, tmp_path: Path, grpo: Grpo) -> None:
    sweep = tmp_path / "x/sweep"
    shutil.copytree(whole, sweep, symlinks=True)
    assert grpo("-m", "sweep_dir=x/sweep")[0] == 0
    assert list_trials(load_study(sweep)) == list_trials(load_study(whole))  # nothing left to do
    code, printed = grpo("-m", "sweep_dir=x/sweep", "hydra.sweeper.n_trials=6")
    assert code == 0, printed
    assert list_trials(load_study(sweep))[:5] == list_trials(load_study(whole))
    assert len(load_study(sweep).trials) == 6


def test_a_search_may_be_moved(whole: Path, tmp_path: Path, grpo: Grpo) -> None:
    """Its trials still belong to it when the folder has another name."""
    shutil.copytree(whole, tmp_path / "elsewhere", symlinks=True)
    code, printed = grpo("-m", "sweep_dir=elsewhere")
    assert code == 0, printed
    assert list_trials(load_study(tmp_path / "elsewhere")) == list_trials(load_study(whole))
    assert len((tmp_path / "elsewhere/results.csv").read_text().splitlines()) == 1 + 5


def test_a_study_of_something_else_is_refused(whole: Path, tmp_path: Path, grpo: Grpo) -> None:
    sweep = tmp_path / "x/sweep"
    shutil.copytree(whole, sweep, symlinks=True)
    for overrides, part in (
        (("kl_weight=interval(0,0.2)",), "space"),
        (("batch_size=8",), "fixed"),
        (("hydra.sweeper.objectives={eval/accuracy: maximize}",), "objectives"),
    ):
        code, printed = grpo("-m", "sweep_dir=x/sweep", *overrides)
        assert code == 2, printed
        assert f"this study's {part} was" in printed
    assert grpo("-m", *TWO_STEPS, "seed=0,1", "sweep_dir=x/sweep")[0] == 2  # a grid
    assert list_trials(load_study(sweep)) == list_trials(load_study(whole))


@pytest.mark.slow
def test_two_processes_share_a_study(tmp_path: Path) -> None:
    """No trial is lost or doubled."""
    command = (*SEARCH, "max_steps=1", "hydra.sweeper.n_trials=4", "sweep_dir=sweep")
    processes = [start_grpo(tmp_path, *command) for _ in range(2)]
    assert [process.wait(300) for process in processes] == [0, 0]
    study = load_study(tmp_path / "sweep")
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 4
    for trial in study.trials:
        log = (tmp_path / "sweep" / str(trial.number) / "train.log").read_text()
        assert log.count("1 steps of") == 1
        assert (
            trial.value
            == read_summary(tmp_path / "sweep" / str(trial.number))["objective"]["value"]
        )
    printed = [log.read_text() for log in tmp_path.glob("process*.log")]
    ran = [text.count("\njob ") for text in printed]
    assert sum(ran) == 4
    assert min(ran) >= 1


@pytest.mark.slow
def test_several_objectives(grpo: Grpo, tmp_path: Path) -> None:
    code, printed = grpo(
        *SEARCH, "hydra.sweeper.n_trials=3", "sweep_dir=sweep",
        "hydra.sweeper.objectives={eval/sampled_accuracy: maximize, kl/mean: minimize}",
    )  # fmt: skip
    assert code == 0, printed
    for trial in load_study(tmp_path / "sweep").trials:
        last = read_metrics(tmp_path / "sweep" / str(trial.number))[-1]
        assert trial.values == [last["eval/sampled_accuracy"], last["kl/mean"]]
    _, _, best = printed.rpartition("best:\n")
    unbeaten = {trial.number for trial in load_study(tmp_path / "sweep").best_trials}
    assert set(map(int, re.findall(r"^  job (\d+):", best, re.MULTILINE))) == unbeaten
    page = (tmp_path / "sweep/report.html").read_text()
    assert "<code>eval/sampled_accuracy</code>; <code>kl/mean</code>, minimized" in page
    assert "<h3>The objectives against each other</h3>" in page


def test_the_report_ranks_by_what_was_searched(grpo: Grpo, tmp_path: Path) -> None:
    """The search's objective may differ from the config's, and may be minimized."""
    code, printed = grpo(
        *SEARCH, "hydra.sweeper.n_trials=3", "sweep_dir=sweep",
        "hydra.sweeper.objectives={kl/mean: minimize}",
    )  # fmt: skip
    assert code == 0, printed
    found = read_sweeps([tmp_path / "sweep"])
    ends = {n: read_metrics(tmp_path / "sweep" / str(n))[-1]["kl/mean"] for n in range(3)}
    assert found.objectives == {"kl/mean": "minimize"}
    assert [setting.jobs[0].number for setting in rank_settings(found).settings] == sorted(
        ends, key=lambda n: ends[n]
    )


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12),
    st.booleans(),
)
def test_the_front_is_optunas(points: list[tuple[int, int]], minimized: bool) -> None:
    directions = ["maximize", "minimize" if minimized else "maximize"]
    study = optuna.create_study(directions=directions)
    study.add_trials([create_trial(values=[float(x) for x in point]) for point in points])
    front = {trial.number for trial in study.best_trials}
    best = pareto_mask(points, [False, minimized])
    assert {n for n, is_best in enumerate(best) if is_best} == front


@pytest.mark.slow
def test_every_value_of_a_grid_is_tried(grpo: Grpo, tmp_path: Path) -> None:
    code, printed = grpo(
        "-m", "hydra/sweeper=optuna", *TWO_STEPS, "max_steps=1", "seed=0,1", "kl=k1,k3",
        "hydra.sweeper.sampler=grid", "sweep_dir=sweep",
    )  # fmt: skip
    assert code == 0, printed
    tried = [trial.params for trial in load_study(tmp_path / "sweep").trials]
    assert tried == [{"seed": seed, "kl": kl} for seed in (0, 1) for kl in ("k1", "k3")]


def test_a_value_that_is_missing_fails_its_trial(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kl/mean": null, "loss/total": 2.0}\n')
    assert read_final_values(tmp_path, ["loss/total"]) == ([2.0], "")
    assert read_final_values(tmp_path, ["loss/total", "kl/mean"]) == ([2.0], "kl/mean")


@pytest.mark.parametrize("evaluation", [{"eval/accuracy": None}, {}])
def test_a_value_that_was_no_number_at_the_end_is_none(
    evaluation: dict[str, None], tmp_path: Path
) -> None:
    """An evaluation of NaN is null in both files; an earlier value doesn't count."""
    lines = '{"step": 0, "eval/accuracy": 0.5}\n{"step": 2, "eval/accuracy": null}\n'
    (tmp_path / "metrics.jsonl").write_text(lines)
    write_json(tmp_path / "summary.json", {"last_evaluation": evaluation})
    assert read_final_values(tmp_path, ["eval/accuracy"]) == ([], "eval/accuracy")


def test_every_choice_is_tried_before_the_first_job(grpo: Grpo, tmp_path: Path) -> None:
    code, printed = grpo(
        *SEARCH, "algorithm=grpo,dapoo,dapo", "sweep_dir=sweep", "hydra.sweeper.n_trials=2"
    )
    assert code == 2
    assert "dapoo" in printed
    assert not (tmp_path / "sweep/0").exists()


def test_corners_hold_every_choice_and_both_ends() -> None:
    space: Space = {
        "a": CategoricalDistribution(["x", "y", "z"]),
        "b": IntDistribution(1, 8),
        "c": CategoricalDistribution([1, 2]),
    }
    found = [tuple(corner[key] for key in "abc") for corner in list_corners(space)]
    assert found == [("x", 1, 1), ("y", 1, 1), ("z", 1, 1), ("x", 1, 2), ("z", 8, 2)]


# Storages


@pytest.mark.slow
def test_a_password_lies_in_no_file(grpo: Grpo, tmp_path: Path) -> None:
    """In the URL it is refused; from the environment it is used but not stored."""
    code, printed = grpo(
        *SEARCH, "hydra.sweeper.storage='postgresql://me:s3cret@127.0.0.1:1/x'", "sweep_dir=sweep"
    )
    assert code == 2
    assert "hydra.sweeper.storage='${oc.env:" in printed
    assert "s3cret" not in printed
    url = f"sqlite:///{tmp_path}/study.db?timeout=31"
    done = run_grpo(
        *SEARCH, "hydra.sweeper.storage='${oc.env:OPTUNA_STORAGE}'", "hydra.sweeper.n_trials=1",
        "max_steps=1", "sweep_dir=sweep", cwd=tmp_path, env={"OPTUNA_STORAGE": url},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "study.db").is_file()
    for file in (tmp_path / "sweep").rglob("*"):
        assert not file.is_file() or b"timeout=31" not in file.read_bytes(), file
    again = run_grpo("-m", "sweep_dir=sweep", cwd=tmp_path)
    assert again.returncode == 2
    assert "OPTUNA_STORAGE" in again.stderr


def test_a_process_that_comes_too_late_ends_well(grpo: Grpo, tmp_path: Path) -> None:
    """All trials of the study ran in another folder; there is nothing to report here."""
    where = (
        f"hydra.sweeper.storage='sqlite:///{tmp_path}/study.db'", "hydra.sweeper.study_name=ours",
        "hydra.sweeper.n_trials=1", "max_steps=1",
    )  # fmt: skip
    for folder, says in (("a", "1 finished"), ("b", "nothing was left to do for b")):
        code, printed = grpo(*SEARCH, *where, f"sweep_dir={folder}")
        assert code == 0, printed
        assert says in printed
    code, printed = grpo("report", "b")
    assert code == 2
    assert "no job of this sweep has begun" in printed


@pytest.mark.slow
def test_a_study_in_sqlite_shared_by_two_folders(tmp_path: Path) -> None:
    """Two machines without a common disk share a study: each has its own trials' jobs."""
    url = f"sqlite:///{tmp_path}/study.db"
    where = (
        f"hydra.sweeper.storage='{url}'", "hydra.sweeper.study_name=ours",
        "hydra.sweeper.n_trials=4", "max_steps=1",
    )  # fmt: skip
    processes = [
        start_grpo(tmp_path, *SEARCH, *where, f"sweep_dir={folder}") for folder in ("a", "b")
    ]
    codes = [process.wait(300) for process in processes]
    assert codes == [0, 0], [log.read_text()[-2000:] for log in tmp_path.glob("process*.log")]
    study = optuna.load_study(study_name="ours", storage=url)
    done = [trial.number for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert done == [0, 1, 2, 3]
    ran = [
        {int(job.name) for job in (tmp_path / folder).glob("[0-9]*")} for folder in ("a", "b")
    ]  # fmt: skip
    assert ran[0] | ran[1] == {0, 1, 2, 3}
    assert not ran[0] & ran[1]
    for folder, numbers in zip(("a", "b"), ran, strict=True):
        table = (tmp_path / folder / "results.csv").read_text().splitlines()
        assert len(table) == 1 + len(numbers)


@pytest.fixture
def postgresql(tmp_path: Path) -> Iterator[str]:
    """Starts a separate server, on a socket in its own folder; yields its URL."""
    found = shutil.which("initdb") or next(
        map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None
    )
    if found is None:
        pytest.skip("no PostgreSQL is installed")
    pytest.importorskip("psycopg")
    binaries = Path(found).resolve().parent
    cluster = tmp_path / "cluster"
    as_user: list[str] = []
    if getpass.getuser() == "root":  # PostgreSQL refuses to run as root
        as_user = ["runuser", "-u", "postgres", "--"]
        for folder in (tmp_path, *tmp_path.parents[:3]):
            folder.chmod(stat.S_IMODE(folder.stat().st_mode) | 0o055)
        cluster.mkdir()
        shutil.chown(cluster, "postgres")
    run = [*as_user, str(binaries / "initdb"), "-D", str(cluster), "-U", "grpo", "-A", "trust"]
    subprocess.run(run, check=True, capture_output=True)
    serve = [
        *as_user, str(binaries / "pg_ctl"), "-D", str(cluster), "-w", "-l", str(cluster / "log"),
    ]  # fmt: skip
    settings = f"-c listen_addresses='' -c unix_socket_directories={cluster}"
    subprocess.run([*serve, "-o", settings, "start"], check=True, capture_output=True)
    try:
        yield f"postgresql+psycopg://grpo@/postgres?host={cluster}"
    finally:
        subprocess.run([*serve, "-m", "fast", "stop"], check=True, capture_output=True)


@pytest.mark.slow
def test_a_study_in_postgresql(postgresql: str, tmp_path: Path) -> None:
    run_two_processes(postgresql, tmp_path)


def run_two_processes(url: str, cwd: Path) -> None:
    """Runs two processes on a study: no trial is lost or doubled, and jobs report to it."""
    where = (f"hydra.sweeper.storage='{url}'", "hydra.sweeper.n_trials=3", "sweep_dir=sweep")
    processes = [start_grpo(cwd, *SEARCH, "max_steps=1", *where) for _ in range(2)]
    codes = [process.wait(300) for process in processes]
    assert codes == [0, 0], [log.read_text()[-2000:] for log in cwd.glob("process*.log")]
    name = json.loads((cwd / "sweep/study.json").read_text())["study_name"]
    study = optuna.load_study(study_name=name, storage=url)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3
    for trial in study.trials:
        assert trial.value == read_summary(cwd / "sweep" / str(trial.number))["objective"]["value"]
        assert list(trial.intermediate_values) == [1]


def test_a_locked_database_is_waited_for_or_told(tmp_path: Path, grpo: Grpo) -> None:
    """Another program locks the database file and doesn't release it."""
    file = tmp_path / "study.db"
    holder = (
        "import sqlite3, sys, time\n"
        "c = sqlite3.connect(sys.argv[1])\n"
        "c.execute('create table t(x)')\n"
        "c.execute('begin exclusive')\n"
        "print('held', flush=True)\n"
        "time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(file)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        code, printed = grpo(
            *SEARCH, f"hydra.sweeper.storage='sqlite:///{file}?timeout=1'", "sweep_dir=sweep"
        )
        process.kill()
    assert code == 2
    assert "can't be opened" in printed
    assert "locked" in printed
