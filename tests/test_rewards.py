"""The values of rewards; a failed reward is never a zero."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from grpo.errors import RunError
from grpo.objective import Normalize
from grpo.objective.advantages import (
    group_mean,
    group_std,
    no_scale,
    normalize_then_sum,
    sum_then_normalize,
)
from grpo.rewards import (
    Answer,
    AnswerFormat,
    Cosine,
    Length,
    Task,
    WeightedReward,
    compute_scores,
)
from grpo.rewards.scoring import raise_if_all_failed
from grpo.tracking.tracker import make_completion_rows
from grpo.training.evaluation import verify_leniently_BG
from grpo.training.metrics import score_metrics
from grpo.types import Example, Failure, Prompt, Rollout, Sample


def build_rollout(texts: Sequence[str], answers: Sequence[str]) -> Rollout:
    group = len(texts) // len(answers)

    def make_verifier(answer: str) -> object:
        return lambda text: float(text == answer)

    prompts = [Prompt(f"q{a}", (1,), Example(f"q{a}", a, make_verifier(a))) for a in answers]  # type: ignore[arg-type]
    assert group * len(answers) == len(texts)
    return Rollout(
        prompts=tuple(prompts),
        tokens_NC=torch.arange(2 * len(texts)).view(-1, 2),
        logprobs_NC=torch.zeros(len(texts), 2),
        lengths_N=torch.tensor([2 - n % 2 for n in range(len(texts))]),
        truncated_N=torch.zeros(len(texts), dtype=torch.bool),
        texts=tuple(texts),
    )


def test_each_completion_meets_its_own_answer() -> None:
    """With 2 prompts x 2 completions: the pairing that the study note got wrong."""
    texts = ["<answer>1</answer>", "<answer>2</answer>", "<answer>1</answer>", "<answer>2</answer>"]
    scores = compute_scores(
        build_rollout(texts, ["1", "2"]), {"answer": WeightedReward(Answer(), 1.0)}
    )
    assert scores.total_BG.tolist() == [[1, 0], [0, 1]]


def test_parts_are_weighed_and_named() -> None:
    rewards = {
        "answer": WeightedReward(Answer(), 1.0),
        "format": WeightedReward(AnswerFormat(), 0.2),
        "task": WeightedReward(Task(), -0.5),
    }
    scores = compute_scores(build_rollout(["<answer>1</answer>", "1"], ["1"]), rewards)
    assert {name: part.tolist() for name, part in scores.parts.items()} == {
        "answer": [1, 0],
        "format": [1, 0],
        "task": [0, 1],
    }
    assert_close(scores.total_BG, torch.tensor([[1.2, -0.5]]))
    assert score_metrics(scores)["reward/format"] == 0.5


def test_groups_by_hand() -> None:
    """Of three groups, one is all right, one is all wrong with equal rewards, one is half right."""
    texts = ["1", "1", "x", "x", "3", "x"]
    scores = compute_scores(
        build_rollout(texts, ["1", "2", "3"]), {"task": WeightedReward(Task(), 1.0)}
    )
    metrics = score_metrics(scores)
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

    compute_scores(
        build_rollout(["a", "b", "c", "d"], ["1", "2"]), {"spy": WeightedReward(spy, 1.0)}
    )
    assert [(s.prompt, s.completion, s.answer, s.group) for s in seen] == [
        ("q1", "a", "1", 0),
        ("q1", "b", "1", 0),
        ("q2", "c", "2", 1),
        ("q2", "d", "2", 1),
    ]
    assert [s.token_ids for s in seen] == [(0, 1), (2,), (4, 5), (6,)]  # without padding


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
        compute_scores(
            build_rollout(["a", "b", "c", "d"], ["1", "2"]),
            {"mine": WeightedReward(reward, 1.0)},  # type: ignore[arg-type]
        )
    message = str(caught.value)
    assert says in message
    assert "reward.mine" in message
    assert "prompt:     'q2'" in message
    assert "completion: 'c'" in message


def test_the_wrong_number_of_values_is_refused() -> None:
    with pytest.raises(RunError, match="3 values for 4 completions"):
        compute_scores(
            build_rollout(["a", "b", "c", "d"], ["1", "2"]),
            {"mine": WeightedReward(lambda samples: [0.0] * 3, 1.0)},
        )


def build_reward(*values: object) -> WeightedReward:
    return WeightedReward(lambda samples: list(values), 1.0)  # type: ignore[arg-type, return-value]


def test_a_reward_may_not_apply_or_fail_and_that_is_never_a_zero(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of two rewards, four completions have: both, only one, only the other, and neither."""
    rewards = {
        "first": build_reward(1.0, 1.0, None, None),
        "second": build_reward(2.0, Failure("no answer within 5 s"), 2.0, None),
    }
    scores = compute_scores(build_rollout(["a", "b", "c", "d"], ["1", "2"]), rewards)
    total_N = scores.total_BG.flatten()
    assert total_N.isnan().tolist() == [False, True, False, True]
    assert (total_N[0], total_N[2]) == (3.0, 2.0)
    metrics = score_metrics(scores)
    assert metrics["reward/failed"] == 1
    assert metrics["reward/mean"] == 2.5
    assert metrics["reward/first"] == 1.0
    assert metrics["reward/second"] == 2.0
    assert "reward.second failed for 1 of 4 completions" in caplog.text
    assert "no answer within 5 s" in caplog.text
    rows = make_completion_rows(
        1, build_rollout(["a", "b", "c", "d"], ["1", "2"]), scores, torch.zeros(2, 2), 2
    )
    assert [row.failed for row in rows] == ["", "second: no answer within 5 s", "", ""]
    assert rows[1].rewards["first"] == 1.0  # its known parts are still logged
    assert math.isnan(rows[1].reward)


SIX, JUDGED = (0.0, 1.0, 2.0, 3.0, 1.0, 5.0), (1.0, 0.0, 1.0, 1.0, Failure("down"), 0.0)


@pytest.mark.parametrize("aggregate", [sum_then_normalize, normalize_then_sum])
def test_a_completion_with_a_failed_reward_changes_nothing_for_the_others(
    aggregate: Callable[..., torch.Tensor],
) -> None:
    """Their advantages are those of the group without it; its own advantage is 0."""
    normalize = Normalize(group_mean, group_std)

    def compute_advantages(*keep: int) -> list[float]:
        rewards = {
            "length": build_reward(*[SIX[n] for n in keep]),
            "judge": build_reward(*[JUDGED[n] for n in keep]),
        }
        scores = compute_scores(build_rollout(["x"] * len(keep), ["1"]), rewards)
        found: list[float] = aggregate(*scores.stack_parts(), normalize)[0].tolist()
        return found

    whole, without = compute_advantages(0, 1, 2, 3, 4, 5), compute_advantages(0, 1, 2, 3, 5)
    assert whole[4] == 0.0
    assert [*whole[:4], whole[5]] == pytest.approx(without, abs=1e-6)


def test_a_failure_is_not_what_a_wrong_answer_is() -> None:
    """Right, failed, right, right are equal rewards; right, wrong, right, right are not."""
    style = build_reward(0.5, 0.5, 0.5, 0.5)
    for second, expected in ((Failure("timeout"), 0.0), (0.0, -1.5)):
        rewards = {"style": style, "judge": build_reward(1.0, second, 1.0, 1.0)}
        scores = compute_scores(build_rollout(["a", "b", "c", "d"], ["1"]), rewards)
        normalize = Normalize(group_mean, group_std)
        advantages = sum_then_normalize(*scores.stack_parts(), normalize)[0].tolist()
        assert advantages[1] == pytest.approx(expected, abs=1e-3)
        assert score_metrics(scores)["reward/zero_variance_groups"] == float(expected == 0.0)


def test_a_reward_that_fails_everywhere_stops_the_run() -> None:
    """Completions that the reward doesn't apply to don't count."""
    four, works = build_rollout(["a", "b", "c", "d"], ["1", "2"]), build_reward(0, 1, 0, 1)
    down = build_reward(*[Failure("connection refused")] * 4)
    scores = compute_scores(four, {"down": down, "works": works})
    with pytest.raises(RunError, match=r"reward\.down: it failed for all 4 .* connection refused"):
        raise_if_all_failed(four, scores)
    partly = compute_scores(
        four, {"down": build_reward(None, None, Failure("x"), 1.0), "works": works}
    )
    raise_if_all_failed(four, partly)
    nearly = compute_scores(four, {"down": build_reward(None, None, Failure("x"), Failure("y"))})
    with pytest.raises(RunError, match="it failed for all 2 completions"):
        raise_if_all_failed(four, nearly)
    # Each of two rewards works for half of them, and no completion has both.
    halves = {
        "one": build_reward(Failure("no route"), Failure("x"), 1.0, 0.0),
        "other": build_reward(1.0, 0.0, Failure("x"), Failure("x")),
    }
    with pytest.raises(RunError, match="no completion with a reward, the first one with: no route"):
        raise_if_all_failed(four, compute_scores(four, halves))


def test_a_group_with_one_reward_left_teaches_nothing() -> None:
    scores = compute_scores(build_rollout(["a", "b"], ["1"]), {"mine": build_reward(1.0, None)})
    assert score_metrics(scores)["reward/zero_variance_groups"] == 1.0


def test_a_reward_for_one_set_of_a_mix_sees_no_other() -> None:
    mixed = build_rollout(["a", "b", "c", "d"], ["1", "2"])
    examples = [replace(p.example, source=s) for p, s in zip(mixed.prompts, "xy", strict=True)]
    prompts = [replace(p, example=e) for p, e in zip(mixed.prompts, examples, strict=True)]
    seen: list[str] = []

    def spy(samples: Sequence[Sample]) -> list[float]:
        seen.extend(sample.completion for sample in samples)
        return [1.0] * len(samples)

    rewards = {
        "only_y": WeightedReward(spy, 1.0, frozenset("y")),
        "all": build_reward(0.0, 0.0, 0.0, 0.0),
    }
    scores = compute_scores(replace(mixed, prompts=tuple(prompts)), rewards)
    assert seen == ["c", "d"]
    assert scores.total_BG.tolist() == [[0, 0], [1, 1]]
    metrics = score_metrics(scores)
    assert (metrics["reward/from_x"], metrics["reward/from_y"]) == (0.0, 1.0)
    assert metrics["reward/only_y"] == 1.0


class Waiting:
    """Waits until all rewards of its barrier run at the same time; alone, it fails."""

    concurrent = True

    def __init__(self, all_asked: threading.Barrier) -> None:
        self.all_asked = all_asked

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        self.all_asked.wait()
        return [1.0] * len(samples)


def test_slow_rewards_wait_beside_each_other_and_the_rest_stay_on_the_main_thread() -> None:
    threads: list[threading.Thread] = []

    def record_thread(samples: Sequence[Sample]) -> list[float]:
        threads.append(threading.current_thread())
        return [0.0] * len(samples)

    waiting = Waiting(threading.Barrier(3, timeout=10))
    rewards = {name: WeightedReward(waiting, 1.0) for name in ("one", "two", "three")}
    scores = compute_scores(
        build_rollout(["a", "b"], ["1"]), {**rewards, "plain": WeightedReward(record_thread, 1.0)}
    )
    assert scores.total_BG.tolist() == [[3.0, 3.0]]
    assert threads == [threading.main_thread()]


def test_the_data_sets_verifier_is_asked_once_a_completion() -> None:
    """`reward=task` and the accuracy share its verdict, since it may be slow."""
    asked: list[str] = []
    one = build_rollout(["a", "b"], ["1"])
    example = replace(one.prompts[0].example, verify=lambda text: float(bool(asked.append(text))))
    one = replace(one, prompts=(replace(one.prompts[0], example=example),))
    compute_scores(one, {"task": WeightedReward(Task(), 1.0), "again": WeightedReward(Task(), 1.0)})
    assert asked == ["a", "b"]


def test_a_verifier_that_fails_is_counted_and_no_wrong_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The second of two completions: its rewards fail, and it is not counted as right."""
    late = Failure("no verdict within 5 s")
    one = build_rollout(["1", "b"], ["1"])
    example = replace(one.prompts[0].example, verify=lambda text: 1.0 if text == "1" else late)
    one = replace(one, prompts=(replace(one.prompts[0], example=example),))
    for reward in (Task(), Length(), Cosine(max_tokens=4)):
        scores = compute_scores(one, {"own": WeightedReward(reward, 1.0)})
        assert scores.failures == {"own": {1: late.reason}}
        assert scores.right_BG.tolist() == [[True, False]]
    assert "verifier failed for 1 of 2 completions, which are not counted as right" in caplog.text
    assert verify_leniently_BG(one) == [[1.0, 0.0]]
    assert "verifier, read leniently, failed for 1 of 2" in caplog.text


def test_a_penalty_is_taken_off_the_reward() -> None:
    """1 - 0.2 and 0 - 0.1 have mean 0.35; where no reward applies, a penalty has no effect."""
    scores = compute_scores(
        build_rollout(["a", "b", "c", "d"], ["1"]), {"mine": build_reward(1, 0, None, None)}
    )
    penalty_BG, normalize = torch.tensor([[0.2, 0.1, 0.9, 0.0]]), Normalize(group_mean, no_scale)
    found = sum_then_normalize(*scores.stack_parts(), normalize, penalty_BG)
    assert_close(found, torch.tensor([[0.45, -0.45, 0.0, 0.0]]))


def test_a_penalty_keeps_its_size_where_each_reward_is_normalised() -> None:
    """By hand, the rewards 1, 0, 1, 0 normalised twice are ±sqrt(3)/2 twice, so ±0.866.

    The penalties 0.4 and 0 have a mean of 0.2 in their groups. So 0.2 is subtracted or added, and
    no more where they are spread less.
    """
    texts, plain = ["x"] * 4, Normalize(group_mean, group_std)
    scores = compute_scores(build_rollout(texts, ["1", "2"]), {"mine": build_reward(1, 0, 1, 0)})
    parts_RBG, weights_R = scores.stack_parts()
    rewarded = normalize_then_sum(parts_RBG, weights_R, plain)
    assert_close(rewarded.abs(), torch.full((2, 2), 3**0.5 / 2), atol=4e-4, rtol=0)
    penalty_BG = torch.tensor([[0.4, 0.0], [0.0, 0.4]])
    for size in (0.1, 1.0, 10.0, 100.0):
        found = normalize_then_sum(parts_RBG, weights_R, plain, size * penalty_BG)
        off = torch.tensor([[0.2, -0.2], [-0.2, 0.2]])
        assert_close(found, rewarded - size * off, atol=1e-4, rtol=1e-5)
    # A completion without a total is in no mean of penalties.
    failed = compute_scores(
        build_rollout(texts, ["1"]), {"mine": build_reward(1, 0, 1, Failure("down"))}
    )
    penalty_BG = torch.tensor([[0.3, 0.0, 0.0, 50.0]])
    advantages = normalize_then_sum(*failed.stack_parts(), plain, penalty_BG)
    taken = advantages - normalize_then_sum(*failed.stack_parts(), plain)
    assert_close(taken, torch.tensor([[-0.2, 0.1, 0.1, 0.0]]), atol=1e-6, rtol=0)
