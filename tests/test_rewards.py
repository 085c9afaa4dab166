"""Rewards: what they give, and that a failing one is never a zero."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch.testing import assert_close

from grpo.errors import RunError
from grpo.rewards import Answer, AnswerFormat, Task, WeightedReward, score
from grpo.types import Example, Prompt, Rollout, Sample


def rollout(texts: Sequence[str], answers: Sequence[str]) -> Rollout:
    group = len(texts) // len(answers)

    def right(answer: str) -> object:
        return lambda text: float(text == answer)

    prompts = [Prompt(f"q{a}", (1,), Example(f"q{a}", a, right(a))) for a in answers]  # type: ignore[arg-type]
    assert group * len(answers) == len(texts)
    return Rollout(
        prompts=tuple(prompts),
        tokens_NC=torch.arange(2 * len(texts)).view(-1, 2),
        logprobs_NC=torch.zeros(len(texts), 2),
        lengths_N=torch.tensor([2, 1] * (len(texts) // 2)),
        truncated_N=torch.zeros(len(texts), dtype=torch.bool),
        texts=tuple(texts),
    )


def test_each_completion_meets_its_own_answer() -> None:
    """2 prompts x 2 completions: the pairing that the study note got wrong."""
    texts = ["<answer>1</answer>", "<answer>2</answer>", "<answer>1</answer>", "<answer>2</answer>"]
    scores = score(rollout(texts, ["1", "2"]), {"answer": WeightedReward(Answer(), 1.0)})
    assert scores.total_BG.tolist() == [[1, 0], [0, 1]]


def test_parts_are_weighed_and_named() -> None:
    rewards = {
        "answer": WeightedReward(Answer(), 1.0),
        "format": WeightedReward(AnswerFormat(), 0.2),
        "task": WeightedReward(Task(), -0.5),
    }
    scores = score(rollout(["<answer>1</answer>", "1"], ["1"]), rewards)
    assert {name: part.tolist() for name, part in scores.parts.items()} == {
        "answer": [1, 0],
        "format": [1, 0],
        "task": [0, 1],
    }
    assert_close(scores.total_BG, torch.tensor([[1.2, -0.5]]))
    assert scores.metrics()["reward/format"] == 0.5


def test_groups_by_hand() -> None:
    """Three groups: all right, none right (and all alike), half right."""
    texts = ["1", "1", "x", "x", "3", "x"]
    scores = score(rollout(texts, ["1", "2", "3"]), {"task": WeightedReward(Task(), 1.0)})
    metrics = scores.metrics()
    assert metrics["reward/mean"] == 0.5
    assert metrics["reward/std"] == pytest.approx(math.sqrt(0.3))  # 6 values, 5 degrees of freedom
    assert metrics["reward/solved_groups"] == pytest.approx(1 / 3)
    assert metrics["reward/unsolved_groups"] == pytest.approx(1 / 3)
    assert metrics["reward/zero_variance_groups"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>x</think><answer>5</answer>", 1.0),
        ("<answer>5</answer><answer>6</answer>", 0.0),
        ("</answer>5<answer>", 0.0),
        ("<answer>5", 0.0),
        ("5", 0.0),
    ],
)
def test_format_is_exactly_one_pair_of_tags(text: str, reward: float) -> None:
    sample = Sample("q", text, (1,), False, Example("q", "5", float), 0)
    assert AnswerFormat()([sample]) == [reward]


def test_a_reward_sees_prompt_text_tokens_and_row() -> None:
    seen: list[Sample] = []

    def spy(samples: Sequence[Sample]) -> list[float]:
        seen.extend(samples)
        return [0.0] * len(samples)

    score(rollout(["a", "b", "c", "d"], ["1", "2"]), {"spy": WeightedReward(spy, 1.0)})
    assert [(s.prompt, s.completion, s.answer, s.group) for s in seen] == [
        ("q1", "a", "1", 0),
        ("q1", "b", "1", 0),
        ("q2", "c", "2", 1),
        ("q2", "d", "2", 1),
    ]
    assert [s.token_ids for s in seen] == [(0, 1), (2,), (4, 5), (6,)]  # padding is not shown


def raises_on_c(samples: Sequence[Sample]) -> list[float]:
    return [1.0 / (sample.completion != "c") for sample in samples]


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (raises_on_c, "it raised ZeroDivisionError"),
        (lambda samples: [float("nan") if s.completion == "c" else 0 for s in samples], "nan"),
        (lambda samples: [float("inf") if s.completion == "c" else 0 for s in samples], "inf"),
        (lambda samples: ["1" if s.completion == "c" else 0 for s in samples], "'1'"),
    ],
)
def test_a_failing_reward_names_the_prompt_and_completion(reward: object, says: str) -> None:
    with pytest.raises(RunError) as caught:
        score(
            rollout(["a", "b", "c", "d"], ["1", "2"]),
            {"mine": WeightedReward(reward, 1.0)},  # type: ignore[arg-type]
        )
    message = str(caught.value)
    assert says in message
    assert "reward.mine" in message
    assert "prompt:     'q2'" in message
    assert "completion: 'c'" in message


def test_the_wrong_number_of_values_is_refused() -> None:
    with pytest.raises(RunError, match="3 values for 4 completions"):
        score(
            rollout(["a", "b", "c", "d"], ["1", "2"]),
            {"mine": WeightedReward(lambda samples: [0.0] * 3, 1.0)},
        )
