"""Tasks of reasoning-gym whose scorers accept wrong answers or fail."""

from __future__ import annotations

import json
import logging
import pickle
import time
from typing import Any

import pytest
import reasoning_gym

from grpo.data import ReasoningGym
from grpo.data.answers import EXTRACTORS
from grpo.data.gym import compute_credit
from grpo.errors import ConfigError
from grpo.rewards import Answer
from grpo.training.evaluation import read_vote
from grpo.types import Example, Failure, Sample

NO_GOLD = ["boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"]


def read_first(task: str, **options: Any) -> Example:
    return ReasoningGym(task, size=2, eval_size=2, options=options).rows("train")[0]


@pytest.mark.parametrize("task", NO_GOLD)
def test_a_task_without_a_gold_answer_shows_none_and_compares_with_none(task: str) -> None:
    example = read_first(task)
    assert example.answer == ""
    assert example.lenient is not None
    for text in ("<answer>None</answer>", "<answer></answer>"):
        assert example.verify(text) == example.lenient(text) == 0.0
        (value,) = Answer()([Sample("q", text, (1,), False, example, 0)])
        assert isinstance(value, Failure)
        assert "reward=task" in value.reason
    assert read_vote(example, "I don't know") is None


def test_what_such_a_task_accepts_is_right() -> None:
    example = read_first("graph_color")
    colors = {str(k): v for k, v in example.columns["possible_answer"].items()}
    assert example.verify(f"<answer>{json.dumps(colors)}</answer>") == 1.0


def test_a_task_that_takes_any_answer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"game_of_life_halting: .* accepts any answer"):
        read_first("game_of_life_halting")


@pytest.mark.parametrize(("task", "answer"), [("complex_arithmetic", "NaN"), ("coin_flip", "0.0")])
def test_what_a_scorer_takes_for_right_everywhere_is_wrong(
    task: str, answer: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    examples = ReasoningGym(task, size=8, eval_size=2, options={}).rows("train")
    assert "for every problem" in caplog.text
    assert {example.verify(f"<answer>{answer}</answer>") for example in examples} == {0.0}
    assert {example.verify(f"<answer>{example.answer}</answer>") for example in examples} == {1.0}


@pytest.mark.parametrize(
    ("datasets", "says"),
    [
        (None, "name its tasks"),
        ("chain_sum", "name its tasks"),
        (["chain_sum"], r"datasets\[0\]=chain_sum: use name, weight and config"),
        ([{"name": "chain_sum", "share": 1}], "use name, weight and config"),
        ([{"name": "chain_sums"}], "no such task; did you mean chain_sum"),
        ([{"name": "chain_sum", "weight": -1}], "Weight must be positive"),
        ([{"name": "chain_sum"}] * 2, "Duplicate"),
        ([{"name": "chain_sum", "config": {"min_digits": 0}}], "dataset.options of composite"),
    ],
)
def test_a_composite_of_nothing_that_there_is_is_refused(datasets: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_first("composite", **({} if datasets is None else {"datasets": datasets}))


def test_a_composite_is_of_the_tasks_that_are_named() -> None:
    example = read_first(
        "composite", datasets=[{"name": "chain_sum"}, {"name": "gcd", "weight": 2}]
    )
    assert example.verify(f"<answer>{example.answer}</answer>") == 1.0


@pytest.mark.slow
def test_an_answer_that_never_ends_is_a_failure_and_holds_nothing_up() -> None:
    """The scorer evaluates answers: a huge power is a failure, a small one may be right."""
    example = read_first("countdown")
    gold = example.answer
    assert example.verify(f"<answer>({gold}) * 1^0</answer>") == 0.0  # other numbers
    start = time.monotonic()
    assert example.verify("<answer>9**9**9**9</answer>") == Failure("no verdict within 5 s")
    assert time.monotonic() - start < 60
    assert example.verify(f"<answer>{gold}</answer>") == 1.0
    power = read_first("polynomial_multiplication")
    assert "**" in power.answer
    assert power.verify(f"<answer>{power.answer}</answer>") == 1.0


@pytest.mark.parametrize("error", [MemoryError, RecursionError, ValueError])
def test_what_says_nothing_of_an_answer_is_no_zero(error: type[Exception]) -> None:
    class Scorer:
        def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
            raise error

    credit = compute_credit(Scorer(), "1", {"answer": "1"})
    if error is ValueError:  # it has not the form that the task expects
        assert credit == 0.0
    else:
        assert credit == Failure(f"the task's scorer raised {error.__name__}")


@pytest.mark.parametrize("extract", EXTRACTORS)
@pytest.mark.parametrize("text", ["[" * 3000, "(", "\x00", "9" * 5000, "'", "1/0", "nan"])
def test_no_text_stops_a_task_that_works_answers_out(extract: str, text: str) -> None:
    for task in ("countdown", "polynomial_multiplication", "decimal_arithmetic"):
        example = ReasoningGym(task, 1, 1, {}, extract=extract).rows("train")[0]
        assert example.verify(text) == 0.0


def test_problems_can_be_sent_to_another_process() -> None:
    for task in ("polynomial_multiplication", "simple_integration", "countdown", "puzzle24"):
        pickle.dumps(reasoning_gym.create_dataset(task, size=1, seed=0))
