"""The figures of an evaluation, by hand and by the command."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.data.answers import answered
from grpo.rewards import Task, WeightedReward, compute_scores
from grpo.training.evaluation import (
    ScoredRollout,
    accuracy_by_source,
    compute_accuracies,
    pass_at_k,
    powers_of_two,
    summarize_evaluation,
)
from grpo.types import Prompt, Rollout
from tests.conftest import read_lines

Grpo = Callable[..., tuple[int, str]]


def score_answers(
    texts: list[list[str]], golds: list[str], sources: list[str] | None = None
) -> ScoredRollout:
    """Returns completions of some prompts, scored by a verifier that reads the `<answer>` tag."""
    flat = [text for row in texts for text in row]
    prompts = []
    for gold, source in zip(golds, sources or [""] * len(golds), strict=True):
        example = answered("q", gold, "tag", {})
        prompts.append(Prompt("q", (1,), type(example)(**{**vars(example), "source": source})))
    rollout = Rollout(
        prompts=tuple(prompts),
        tokens_NC=torch.zeros(len(flat), 1, dtype=torch.int64),
        logprobs_NC=torch.zeros(len(flat), 1),
        lengths_N=torch.ones(len(flat), dtype=torch.int64),
        truncated_N=torch.zeros(len(flat), dtype=torch.bool),
        texts=tuple(flat),
    )
    return ScoredRollout(rollout, compute_scores(rollout, {"task": WeightedReward(Task(), 1.0)}))


def tag(answer: str) -> str:
    return f"<answer>{answer}</answer>"


@given(st.integers(1, 8), st.data())
def test_pass_at_k_counts_the_draws_with_a_right_one(samples: int, data: st.DataObject) -> None:
    """Compares it with a count of all ways to draw k of the samples."""
    right = data.draw(st.integers(0, samples))
    k = data.draw(st.integers(1, samples))
    draws = list(itertools.combinations([1] * right + [0] * (samples - right), k))
    assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_k_doubles_up_to_the_number_of_samples() -> None:
    assert powers_of_two(1) == [1]
    assert powers_of_two(8) == [1, 2, 4, 8]
    assert powers_of_two(12) == [1, 2, 4, 8, 12]


def test_figures_by_hand() -> None:
    """Of four samples, two are 7, written differently, one is 8, and one has a 7 without a tag."""
    sampled = score_answers([[tag("7"), tag("7.0"), tag("8"), "so 7"]], ["7"])
    found = compute_accuracies(None, sampled, [0])
    assert found == {
        "prompts": 1,
        "sampled": 0.5,
        "sampled lenient": 0.75,
        "pass@1": 0.5,
        "pass@2": pytest.approx(1 - 1 / 6),
        "pass@4": 1.0,
        "majority@4": 1.0,
    }


@pytest.mark.parametrize(
    ("texts", "majority"),
    [
        (["1", "1", "7", "2"], 0.0),  # the most common answer is wrong
        (["7", "7", "1", "1"], 0.5),  # a tie is shared
        (["7", "8", "9", "1"], 0.25),
        (["7", "7", "7", "1"], 1.0),
        (["1e1000000", "10e999999", "7", "2"], 0.0),  # a vote like any other, never expanded
        (["9e999999999", "7", "-9e999999999", "2"], 0.25),
        (["1" * 30, "1" * 29 + "2", "7", "7.0"], 1.0),  # the same in 28 digits, but not equal
    ],
)
def test_the_majoritys_answer_counts(texts: list[str], majority: float) -> None:
    sampled = score_answers([[tag(text) for text in texts]], ["7"])
    assert compute_accuracies(None, sampled, [0])["majority@4"] == majority


def test_without_any_answer_there_is_no_majority() -> None:
    assert compute_accuracies(None, score_answers([["?", "?"]], ["7"]), [0])["majority@2"] == 0.0


def test_each_set_of_a_mix_is_told_apart() -> None:
    greedy = score_answers([[tag("1")], [tag("0")], [tag("3")]], ["1", "2", "3"], ["a", "b", "a"])
    found = summarize_evaluation(greedy, None)
    assert {name: (figures["prompts"], figures["greedy"]) for name, figures in found.items()} == {
        "all": (3, pytest.approx(2 / 3)),
        "a": (2, 1.0),
        "b": (1, 0.0),
    }
    assert accuracy_by_source(greedy, None) == {
        "eval/accuracy_from_a": 1.0,
        "eval/accuracy_from_b": 0.0,
    }


def test_the_command_writes_a_table_and_everything_behind_it(grpo: Grpo, tmp_path: Path) -> None:
    """Evaluates a mix, then a model's folder, only greedy and only sampled."""
    sizes = [f"dataset.sets.{name}.eval_size=5" for name in ("sums", "differences")]
    code, printed = grpo(
        "experiment=smoke", "dataset=mix", *sizes, "max_steps=1", "tracking=none",
        "hydra.run.dir=run",
    )  # fmt: skip
    assert code == 0, printed
    metrics = read_lines(tmp_path / "run/metrics.jsonl")[-1]
    assert {"eval/accuracy_from_sums", "eval/sampled_accuracy_from_differences"} <= set(metrics)
    assert any(name.startswith("reward/from_") for name in metrics)

    code, printed = grpo("eval", "checkpoint=run", "eval.samples=4", "hydra.run.dir=all")
    assert code == 0, printed
    evaluation = json.loads((tmp_path / "all/evaluation.json").read_text())
    assert set(evaluation["figures"]) == {"all", "sums", "differences"}
    whole = evaluation["figures"]["all"]
    assert whole["sampled"] == whole["pass@1"] == pytest.approx(evaluation["eval/sampled_accuracy"])
    assert whole["pass@4"] == pytest.approx(evaluation["eval/pass_at_k"])
    for name, figures in evaluation["figures"].items():
        assert name in printed
        assert f"{figures['majority@4']:.1%}" in printed
    rows = read_lines(tmp_path / "all/completions.jsonl")
    assert len(rows) == 10 * (1 + 4)
    sampled = [row for row in rows if not row["greedy"]]
    assert sum(row["right"] for row in sampled) / 40 == pytest.approx(whole["sampled"])

    folder = "run/checkpoints/latest/model"
    code, printed = grpo(
        "eval", f"checkpoint={folder}", "eval.samples=0", "dataset.sets.sums.eval_size=2",
        "hydra.run.dir=greedy",
    )  # fmt: skip
    assert code == 0, printed
    greedy = json.loads((tmp_path / "greedy/evaluation.json").read_text())
    assert "eval/sampled_accuracy" not in greedy
    code, printed = grpo(
        "eval", f"checkpoint={folder}", "eval.greedy=false", "dataset.sets.sums.eval_size=2",
        "hydra.run.dir=sampled",
    )  # fmt: skip
    assert code == 0, printed
    assert "eval/accuracy" not in json.loads((tmp_path / "sampled/evaluation.json").read_text())


def test_prompts_are_chosen_by_difficulty_once_a_run(grpo: Grpo, tmp_path: Path) -> None:
    """Keeps prompts that are sometimes solved, easy ones first; a resumed run reads the file."""
    common = [
        "experiment=smoke", "tracking=none", "dataset.size=40", "dataset.eval_size=4",
        "curriculum.samples=4", "curriculum.order=easy_first", "curriculum.at_least=0.25",
        "curriculum.at_most=0.75", "log_prompts=4",
    ]  # fmt: skip
    code, printed = grpo(*common, "max_steps=1", "hydra.run.dir=run")
    assert code == 0, printed
    measured = read_lines(tmp_path / "run/difficulty.jsonl")
    assert len(measured) == 40
    kept = [row for row in measured if 0.25 <= row["solved"] <= 0.75]
    kept.sort(key=lambda row: row["solved"], reverse=True)
    always = sum(row["solved"] == 1 for row in measured)
    assert f"of 40 training prompts, {always} are always solved" in printed
    trained = [row["prompt"] for row in read_lines(tmp_path / "run/completions.jsonl")]
    assert trained[::4] == [row["prompt"] for row in kept[:4]]
    code, printed = grpo("resume=run", "max_steps=2")
    assert code == 0, printed
    assert "prompts measured" not in printed
    assert read_lines(tmp_path / "run/difficulty.jsonl") == measured
    # A measurement continues after a crash, but not with another number of samples.
    (tmp_path / "half").mkdir()
    rest = (tmp_path / "run/difficulty.jsonl").read_text().splitlines(keepends=True)[:30]
    (tmp_path / "half/difficulty.jsonl").write_text("".join(rest))
    code, printed = grpo(*common, "max_steps=1", "hydra.run.dir=half")
    assert code == 0, printed
    assert "difficulty: 40 of 40 prompts measured" in printed
    assert read_lines(tmp_path / "half/difficulty.jsonl")[:30] == measured[:30]
    (tmp_path / "half/metrics.jsonl").unlink()
    code, printed = grpo(*common, "max_steps=1", "curriculum.samples=2", "hydra.run.dir=half")
    assert "measuring anew" in printed
    trained = [row["prompt"] for row in read_lines(tmp_path / "run/completions.jsonl")]
    assert trained[16::4] == [row["prompt"] for row in kept[4:8]]


@pytest.mark.slow
def test_the_evaluation_may_have_a_temperature_of_its_own(grpo: Grpo, tmp_path: Path) -> None:
    """Runs at several temperatures can then be compared."""
    job = ("experiment=smoke", "tracking=none", "max_steps=1")
    for folder, more in (
        ("plain", ()),
        ("apart", ("temperature=2", "eval.temperature=1")),
        ("hot", ("temperature=2",)),
    ):  # fmt: skip
        code, printed = grpo(*job, *more, f"hydra.run.dir={folder}")
        assert code == 0, printed
    plain, apart, hot = (
        json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[0])
        for run in ("plain", "apart", "hot")
    )
    assert apart == plain
    assert hot["eval/sampled_accuracy"] < plain["eval/sampled_accuracy"]
    assert hot["eval/accuracy"] == plain["eval/accuracy"]
