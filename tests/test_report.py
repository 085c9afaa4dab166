"""The report of a sweep, made from real sweeps' folders."""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow.parquet as parquet
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import FloatDistribution
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import create_trial

from grpo.report.sweep.best import build_best_setting, format_experiment
from grpo.report.sweep.importance import fanova
from grpo.report.sweep.ranking import rank_settings
from grpo.report.sweep.read import Job, Sweep, read_sweeps
from grpo.report.sweep.write import choose_best, write_report
from grpo.sweep.study import serialize_space
from tests.conftest import make_once, read_metrics, run_grpo
from tests.test_sweep import TWO_STEPS, Grpo

GRID = (
    "-m", *TWO_STEPS, "max_steps=1", "kl_weight=0,0.1", "learning_rate=1e-4,3e-3", "seed=0,1",
)  # fmt: skip


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:

    def make(cwd: Path) -> None:
        done = run_grpo(*GRID, "sweep_dir=sweep", cwd=cwd)
        assert done.returncode == 0, done.stderr
        assert "best:   grpo --config-dir sweep experiment=best" in done.stdout

    return make_once(tmp_path_factory, "reported", make) / "sweep"


@pytest.fixture
def copy(sweep: Path, tmp_path: Path) -> Path:
    """A copy of the sweep that a test may change."""
    shutil.copytree(sweep, tmp_path / "sweep", symlinks=True)
    return tmp_path / "sweep"


def read_rows(sweep: Path, table: str = "results") -> list[dict[str, str]]:
    with (sweep / f"{table}.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_table_has_a_row_a_job(sweep: Path) -> None:
    found = read_rows(sweep)
    assert len(found) == 8
    for n, row in enumerate(found):
        last = read_metrics(sweep / str(n))[-1]
        assert int(row["job"]) == n
        assert row["status"] == "finished"
        assert float(row["objective"]) == last["eval/sampled_accuracy"]
        assert float(row["last/kl/mean"] or 0) == last.get("kl/mean", 0)
        assert float(row["kl_weight"]) == [0, 0, 0, 0, 0.1, 0.1, 0.1, 0.1][n]
        assert float(row["learning_rate"]) == [1e-4, 1e-4, 3e-3, 3e-3][n % 4]
        assert int(row["seed"]) == n % 2
        assert float(row["seconds"]) > 0
    assert parquet.read_table(sweep / "results.parquet").num_rows == 8


def test_seeds_are_folded_and_settings_ranked(sweep: Path) -> None:
    found = rank_settings(read_sweeps([sweep]))
    assert found.keys == ["kl_weight", "learning_rate"]
    assert len(found.settings) == 4
    by_hand: dict[tuple[float, float], list[float]] = {}
    for row in read_rows(sweep):
        setting = (float(row["kl_weight"]), float(row["learning_rate"]))
        by_hand.setdefault(setting, []).append(float(row["objective"]))
    means = {setting: sum(values) / 2 for setting, values in by_hand.items()}
    for setting in found.settings:
        assert setting.mean == pytest.approx(means[setting.values])
        assert sorted(setting.by_seed) == [0, 1]
    ordered = [setting.mean for setting in found.settings]
    assert ordered == sorted(means.values(), reverse=True)
    fewest = rank_settings(
        replace(read_sweeps([sweep]), objectives={"eval/sampled_accuracy": "minimize"})
    )
    assert [setting.mean for setting in fewest.settings] == ordered[::-1]


@pytest.mark.slow
def test_the_best_setting_gives_the_same_run_again(sweep: Path) -> None:
    best = rank_settings(read_sweeps([sweep])).settings[0]
    done = run_grpo(
        "--config-dir", str(sweep), "experiment=best", "hydra.run.dir=again", cwd=sweep.parent
    )
    assert done.returncode == 0, done.stderr
    job = next(job for job in best.jobs if job.values["seed"] == 0)
    assert read_metrics(sweep.parent / "again") == read_metrics(job.folder)


@pytest.mark.slow
def test_the_best_of_a_sweep_of_the_best(sweep: Path) -> None:
    """Its experiment file includes the first sweep's, so it needs another name."""
    arguments = ("--config-dir", "sweep", "experiment=best", "tracking=none")
    done = run_grpo("-m", *arguments, "temperature=0.7,1.3", "sweep_dir=hot", cwd=sweep.parent)
    assert done.returncode == 0, done.stderr
    command = re.findall(r"best: +grpo (.*)", done.stdout)[-1]
    assert command.endswith("experiment=best_2")
    run = "hydra.run.dir=of_the_best"
    done = run_grpo(*shlex.split(command), run, "tracking=none", cwd=sweep.parent)
    assert done.returncode == 0, done.stderr
    (job, *_) = rank_settings(read_sweeps([sweep.parent / "hot"])).settings[0].jobs
    assert read_metrics(sweep.parent / "of_the_best") == read_metrics(job.folder)


def test_a_grid_may_be_after_less_of_something(sweep: Path, tmp_path: Path) -> None:
    """Ranked by the shortest completions, the setting with the longest is last."""
    shutil.copytree(sweep, tmp_path / "short", symlinks=True)
    record = json.loads((sweep / "sweep.json").read_text())
    assert record["objectives"] == {"eval/sampled_accuracy": "maximize"}
    record["objectives"] = {"eval/length_mean": "minimize"}
    (tmp_path / "short/sweep.json").write_text(json.dumps(record))
    ranking = rank_settings(read_sweeps([tmp_path / "short"]))
    lengths = [
        np.mean([job.last_values["eval/length_mean"] for job in setting.jobs])
        for setting in ranking.settings
    ]
    assert ranking.minimized
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def test_a_direction_is_one_of_two_and_of_one_objective(grpo: Grpo, tmp_path: Path) -> None:
    for overrides, says in (
        (["hydra.sweeper.direction=down"], "hydra.sweeper.direction=down: use maximize or"),
        (["hydra.sweeper.objectives={kl/mean: less}"], "objectives.kl/mean=less: use maximize or"),
        (
            ["hydra.sweeper.objectives={kl/mean: minimize}", "hydra.sweeper.direction=minimize"],
            "has a direction for each",
        ),
        (["hydra.sweeper.objectives={kl/meen: minimize}"], "kl/meen: no run logs this; did you"),
        (["objective=eval/accuracy,eval/reward"], "compared by one"),
    ):
        for sweeper in ("grid", "optuna"):
            values = "seed=0,1" if sweeper == "grid" else "seed=choice(0,1)"
            code, printed = grpo("-m", *TWO_STEPS, f"hydra/sweeper={sweeper}", values, *overrides)
            assert code == 2, printed
            assert says in printed
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("chosen", ["[smoke,mine]", "mine", "none"])
def test_the_best_of_several_experiments_is_composed_as_its_job_was(
    chosen: str, grpo: Grpo, tmp_path: Path
) -> None:
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/mine.yaml").write_text("# @package _global_\nkl_weight: 0.3\n")
    overrides = [f"experiment={chosen}", "seed=7", "kl=k2"]
    best = build_best_setting(tmp_path / "sweep", overrides, "why", "conf")
    (tmp_path / "sweep").mkdir()
    best.write()
    options = ("--config-dir", "conf", "--cfg", "job")
    code, asked = grpo(*options, *overrides)
    assert code == 0, asked
    assert ("kl_weight: 0.3" in asked) == (chosen != "none")
    code, again = grpo(*shlex.split(best.command)[1:], "--cfg", "job")
    assert code == 0, again
    assert again == asked


def test_what_a_sweep_takes_away_the_best_takes_away_too(grpo: Grpo, tmp_path: Path) -> None:
    (tmp_path / "own_of_best.py").write_text("def f(samples):\n    return [1.0 for _ in samples]\n")
    reward = ("~reward.answer", "+reward.own._target_=own_of_best.f", "+reward.own.weight=1")
    code, printed = grpo("-m", *TWO_STEPS, "max_steps=1", *reward, "seed=0,1", "sweep_dir=sweep")
    assert code == 0, printed
    (command,) = re.findall(r"best: +grpo (.*)", printed)
    assert command.endswith("experiment=best '~reward.answer'")
    code, printed = grpo(*shlex.split(command), "hydra.run.dir=of_the_best", "tracking=none")
    assert code == 0, printed
    (job, *_) = rank_settings(read_sweeps([tmp_path / "sweep"])).settings[0].jobs
    assert read_metrics(tmp_path / "of_the_best") == read_metrics(job.folder)
    assert "reward/own" in read_metrics(job.folder)[-1]


def test_the_page_needs_nothing_else(sweep: Path) -> None:
    page = (sweep / "report.html").read_text()
    markup = re.sub(r"<script>.*?</script>", "", page, count=1, flags=re.DOTALL)  # Plotly itself
    assert not re.search(r"(src|href)=", markup)
    assert not re.search(r"url\(", markup)
    for title in (
        "Ranking", "Settings, best first", "The objective by each key", "Two keys at a time",
        "What matters", "All keys at once", "Learning curves", "Reward against KL",
        "Time and tokens", "Jobs",
    ):  # fmt: skip
        assert re.search(f"<h[23]>{title}</h[23]>", page)


def test_a_half_finished_sweep_has_a_report(copy: Path, grpo: Grpo) -> None:
    """Jobs that were killed, failed or never began are in the table, but in no mean."""
    shutil.rmtree(copy / "7")
    for number, status, error in (("5", "running", None), ("6", "failed", "a <b>reason</b>")):
        file = copy / number / "summary.json"
        content = json.loads(file.read_text()) | {"status": status, "error": error}
        file.write_text(json.dumps(content))
    code, printed = grpo("report", "sweep")
    assert code == 0, printed
    assert [row["status"] for row in read_rows(copy)] == ["finished"] * 5 + [
        "killed",
        "failed",
        "none",
    ]
    assert [row["objective"] == "" for row in read_rows(copy)] == [False] * 5 + [True] * 3
    page = (copy / "report.html").read_text()
    assert "job 6: a &lt;b&gt;reason&lt;/b&gt;" in page  # text can't become part of the page
    assert "<b>reason" not in page
    assert [len(s.by_seed) for s in rank_settings(read_sweeps([copy])).settings].count(2) == 2


def test_a_half_finished_sweep_of_another_objective(copy: Path, grpo: Grpo) -> None:
    """Jobs that have not begun have the same objective."""
    for number in range(8):
        file = copy / str(number) / "summary.json"
        file.write_text(file.read_text().replace("eval/sampled_accuracy", "eval/accuracy"))
    record = json.loads((copy / "sweep.json").read_text())
    (copy / "sweep.json").write_text(json.dumps({**record, "objectives": {}}))  # as once
    shutil.rmtree(copy / "7")
    code, printed = grpo("report", "sweep")
    assert code == 0, printed
    assert read_sweeps([copy]).objectives == {"eval/accuracy": "maximize"}


def build_sweep(
    by_setting: dict[str, dict[int, float | None]], trials: int = 0, way: str = "maximize"
) -> Sweep:
    """Makes a sweep with these values for each setting and seed; None: not finite."""
    jobs = []
    for name, by_seed in by_setting.items():
        for seed, value in by_seed.items():
            values = {"key": name, "seed": seed}
            lines = [{"step": 0, "eval/accuracy": 0.01}, {"step": 1, "eval/accuracy": value}]
            job = Job(
                "",
                len(jobs),
                Path(),
                "finished",
                "",
                [],
                values,
                "eval/accuracy",
                lines,
                1.0,
                trials,
            )
            jobs.append(job)
    return Sweep([Path("sweep")], jobs, {"eval/accuracy": way})


def test_the_verdict_says_what_is_missing() -> None:
    one_seed = rank_settings(build_sweep({"a": {0: 0.9, 1: 0.8}, "b": {0: 0.7}}))
    assert "one of the two has a single seed" in one_seed.conclusion
    significant = rank_settings(
        build_sweep({"a": {0: 0.1, 1: 0.2}, "b": {0: 0.3, 1: 0.4001}}, way="minimize")
    )
    assert significant.conclusion == (
        "key=a came out lowest, at 0.15, significantly better than every other setting."
    )
    alone = rank_settings(build_sweep({"a": {0: 0.1}, "b": {0: 0.3}}))
    assert "key=b came out highest, at 0.3, on one seed each" in alone.conclusion
    assert rank_settings(build_sweep({"a": {0: 0.1}})).conclusion.startswith(
        "There is only one setting, at 0.1"
    )
    close = rank_settings(
        build_sweep({"a": {0: 0.5, 1: 0.6, 2: 0.7}, "b": {0: 0.5, 1: 0.55, 2: 0.8}})
    )
    assert (
        "key=b came out highest, at 0.6167, but not significantly better than any other setting. "
        "The difference from key=a is not significant: they" in close.conclusion
    )
    assert re.search(
        r"differ by 0.017; 3 seeds each find a difference of 0\.\d+ four", close.conclusion
    )


def test_a_tie_to_the_last_digit_is_called_one() -> None:
    for seeds in ((0,), (0, 1)):
        found = rank_settings(
            build_sweep(
                {n: dict.fromkeys(seeds, v) for n, v in {"a": 0.5, "b": 0.25, "c": 0.5}.items()}
            )
        )
        assert found.conclusion.startswith("key=a and key=c are tied at 0.5, the highest")
        assert found.gaps_to_best == [0.0, 0.25]
    assert found.conclusion.endswith(
        "The difference from key=b is not significant: there is no spread to judge a difference by."
    )
    values = [0.5, 0.6, 0.55, 0.52, 0.58]
    far = {"a": values, "b": [0.1, 0.2, 0.16, 0.12, 0.17], "c": values[::-1]}
    assert rank_settings(
        build_sweep({n: dict(enumerate(v)) for n, v in far.items()})
    ).conclusion.endswith(
        "at 0.55, the highest. The first is significantly better than every other setting."
    )
    both = rank_settings(build_sweep({"a": {0: 0.4, 1: 0.6}, "b": {0: 0.4, 1: 0.6}}))
    assert both.conclusion == "key=a and key=b are tied at 0.5, the highest."
    near = rank_settings(
        build_sweep({"a": {0: 0.4, 1: 0.6}, "b": {0: 0.55, 1: 0.35}, "c": {0: 0.6, 1: 0.4}})
    )
    assert near.conclusion.startswith(
        "key=a and key=c are tied at 0.5, the highest. The first is not significantly better than "
        "any other setting. The difference from key=b is not significant: they differ by 0.05;"
    )


def test_jobs_of_one_seed_in_several_sweeps_are_averaged() -> None:
    """By hand: 0.4 and 0.6 on seed 0 are 0.5, and 0.7 on seed 1."""
    sweep = build_sweep({"a": {0: 0.4, 1: 0.7}, "b": {0: 0.3, 1: 0.2}})
    again = build_sweep({"a": {0: 0.6}})
    (setting, _) = rank_settings(replace(sweep, jobs=[*sweep.jobs, *again.jobs])).settings
    assert setting.by_seed == {0: pytest.approx(0.5), 1: 0.7}
    assert len(setting.jobs) == 3


def test_the_setting_that_is_worse_on_the_shared_seeds_is_not_the_best() -> None:
    """It is worse by 0.105 on both shared seeds; its job on a seed hard for all failed."""
    found = rank_settings(build_sweep({"a": {0: 0.8, 1: 0.79}, "b": {0: 0.9, 1: 0.9, 2: 0.3}}))
    assert found.settings[0].values == ("b",)
    assert found.gaps_to_best == pytest.approx([0.105])
    assert found.has_missing_seeds


def test_a_setting_with_one_seed_left_does_not_win_by_lacking_the_hard_one(tmp_path: Path) -> None:
    """By hand: on seeds 0 and 1, a and c come to 0.475 and 0.85 on average, and to 0.6625 in all.

    So seed 1 adds 0.1875, and b, which has that one alone, stands at 0.85 - 0.1875.
    """
    values = {"a": {0: 0.5, 1: 0.9}, "b": {1: 0.85}, "c": {0: 0.45, 1: 0.8}}
    sweep = build_sweep(values)
    found = rank_settings(sweep)
    assert [setting.values for setting in found.settings] == [("a",), ("b",), ("c",)]
    assert found.adjusted_means == pytest.approx([0.7, 0.6625, 0.625])
    assert found.p[0] == 1.0  # nothing is told of a single seed
    best = choose_best(sweep, found, tmp_path)
    assert best is not None
    assert "eval/accuracy 0.7\n" in best.content
    without = rank_settings(build_sweep({key: values[key] for key in "ac"}))
    assert found.p[1] == without.p[0]  # a single seed changes nothing for the others


def test_a_single_seed_that_no_other_setting_has_is_taken_as_it_is() -> None:
    found = rank_settings(build_sweep({"a": {0: 0.5, 1: 0.9}, "b": {2: 0.85}}))
    assert found.adjusted_means == pytest.approx([0.85, 0.7])


def test_a_value_that_is_no_number_is_no_earlier_one() -> None:
    found = rank_settings(build_sweep({"a": {0: 0.1}, "b": {0: None}}))
    assert [setting.values for setting in found.settings] == [("a",)]


def test_on_one_seed_each_nothing_is_said_that_needs_more(sweep: Path, copy: Path) -> None:
    def read_heads(page: str) -> list[str]:
        ranking = page.partition("<h2>Ranking</h2>")[2].partition("</thead>")[0]
        return re.findall("<th>(.*?)</th>", ranking)

    keys, name = ["kl_weight", "learning_rate", "seeds"], "eval/sampled_accuracy"
    several = [*keys, f"mean {name}", "95% interval", "behind the best", "p"]
    assert read_heads((sweep / "report.html").read_text()) == several
    for number in (1, 3, 5, 7):
        shutil.rmtree(copy / str(number))
    write_report([copy])
    page = (copy / "report.html").read_text()
    assert read_heads(page) == [*keys, name, "behind the best"]
    assert "t-test" not in page


def test_a_sweep_of_which_nothing_has_finished(copy: Path, grpo: Grpo) -> None:
    for number in range(8):
        shutil.rmtree(copy / str(number))
    code, printed = grpo("report", "sweep")
    assert code == 0, printed
    assert "No job has finished with a value of the objective yet." in printed
    assert len(read_rows(copy)) == 8


def test_sweeps_are_reported_together(sweep: Path, copy: Path, grpo: Grpo) -> None:
    """Seeds from another sweep count as seeds of the same settings."""
    record = json.loads((copy / "sweep.json").read_text())
    record["jobs"] = [
        [re.sub("kl_weight=0$", "kl_weight=0.0", o.replace("seed=", "seed=1")) for o in job]
        for job in record["jobs"]
    ]  # the same numbers, written another way
    (copy / "sweep.json").write_text(json.dumps(record))
    files = [copy / name for name in ("report.html", "results.csv", "results.parquet")]
    files.append(copy / "experiment/best.yaml")
    before = [file.read_bytes() for file in files]
    code, printed = grpo("report", "sweep", str(sweep))
    assert code == 0, printed
    assert [file.read_bytes() for file in files] == before
    assert "16 finished" in (copy / "sweeps.html").read_text()
    assert len(parquet.read_table(copy / "sweeps.parquet")) == len(read_rows(copy, "sweeps")) == 16
    assert "  best:   grpo --config-dir sweep experiment=sweeps_best" in printed
    assert yaml.safe_load((copy / "experiment/sweeps_best.yaml").read_text())
    found = rank_settings(read_sweeps([copy, sweep]))
    assert [sorted(setting.by_seed) for setting in found.settings] == [[0, 1, 10, 11]] * 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [((), "name the folder"), (("nowhere",), "no such folder"), (("empty",), "holds no sweep")],
)
def test_a_report_of_nothing_is_refused(
    grpo: Grpo, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    (tmp_path / "empty").mkdir()
    code, printed = grpo("report", *arguments)
    assert code == 2
    assert says in printed


def test_overrides_become_an_experiment() -> None:
    overrides = [
        "eval.samples=2", "sweep=search", "experiment=smoke", "kl=k1", "reward=[answer,length]",
        "kl_weight=0.1", "+reward.brief.limit=25", "optim.schedule=cosine",
        "sampling.stop=['</answer>']", "seed=3", "++resume=null", "sweep_dir=x",
    ]  # fmt: skip
    parsed = OverridesParser.create().parse_overrides(overrides)
    found: dict[str, Any] = yaml.safe_load(format_experiment(parsed, None))
    assert found == {
        "defaults": [
            "smoke", "_self_", {"override /kl": "k1"}, {"override /reward": ["answer", "length"]},
        ],
        "eval": {"temperature": 1.0, "samples": 2},  # the first is the study's
        "kl_weight": 0.1,
        "reward": {"brief": {"limit": 25}},
        "optim": {"schedule": "cosine"},
        "sampling": {"stop": ["</answer>"]},
        "seed": 3,
    }  # fmt: skip


def test_the_key_that_matters_is_found() -> None:
    """With y = 10·a + b, a explains nearly all of the variance; a constant explains none."""
    rows = [{"a": a, "b": b, "c": c} for a in range(4) for b in range(3) for c in ("x", "y")]
    outcomes = [10.0 * row["a"] + row["b"] for row in rows]  # type: ignore[operator]
    found = fanova(rows, outcomes, {})
    assert next(iter(found)) == "a"
    assert found["a"] > 0.9
    assert found["c"] < 0.02
    assert sum(found.values()) == pytest.approx(1)


def test_a_search_and_its_page_agree_on_what_matters() -> None:
    """The learning rate is sampled on a logarithmic scale, and fANOVA uses the same scale."""
    study, rng = optuna.create_study(direction="maximize"), np.random.default_rng(0)
    space = {"rate": FloatDistribution(1e-6, 1e-2, log=True), "kl": FloatDistribution(0.0, 1.0)}
    for _ in range(60):
        params = {"rate": 10.0 ** rng.uniform(-6, -2), "kl": rng.uniform()}
        value = -abs(math.log10(params["rate"]) + 4) - 2 * (params["kl"] - 0.5) ** 2
        study.add_trial(create_trial(params=params, distributions=space, value=value))
    evaluator = FanovaImportanceEvaluator(seed=0)
    expected = optuna.importance.get_param_importances(study, evaluator=evaluator)
    outcomes = [float(trial.value or 0) for trial in study.trials]
    found = fanova([trial.params for trial in study.trials], outcomes, serialize_space(space))
    assert found == pytest.approx(expected, abs=0.02)
    other = fanova(
        [trial.params for trial in study.trials], outcomes, serialize_space({"rate": space["kl"]})
    )
    assert abs(other["rate"] - expected["rate"]) > 0.02  # what it was


def test_the_command_prints_what_the_page_says(sweep: Path) -> None:
    printed = write_report([sweep])
    assert rank_settings(read_sweeps([sweep])).conclusion in printed
