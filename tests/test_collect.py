"""Groups with equal rewards are replaced, and the metrics still cover them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from grpo.data.order import order_one_set
from grpo.data.prompts import LazyPrompts, LazyPromptSet, PromptFormat
from grpo.errors import RunError
from grpo.memory.budget import Budget
from grpo.models.load import LanguageModel
from grpo.rewards import WeightedReward
from grpo.rollout import NativeEngine
from grpo.training.collect import Collector
from grpo.training.sampler import Sampler
from grpo.types import Example, Failure, Prompt, Sample, Sampling

SAMPLING = Sampling(1.0)


def build_collector(
    tiny: LanguageModel, reward: object, resample: int, rows: int = 40
) -> Collector:
    prompts = []
    for n in range(rows):
        question = f"What is {n} + 5?"
        example = Example(question, str(n), lambda text: 0.0, columns={"n": n})
        prompts.append(Prompt(question, tuple(tiny.tokenizer.encode(question)), example))
    return Collector(
        sampler=Sampler(
            NativeEngine(tiny, 6, Budget.from_tokens(10**6)),
            {"mine": WeightedReward(reward, 1.0)},  # type: ignore[arg-type]
        ),
        prompts=prompts,
        order=order_one_set(rows, seed=0),
        sampling=SAMPLING,
        batch_size=6,
        num_generation=4,
        resample=resample,
        seed=3,
    )


def reward_odd_groups_unequally(samples: Sequence[Sample]) -> list[float]:
    """Gives equal rewards to the groups of even questions, and different ones to the others."""
    return [
        float(i % 4) if sample.example.columns["n"] % 2 else 1.0 for i, sample in enumerate(samples)
    ]


def list_numbers(prompts: Sequence[Prompt]) -> list[int]:
    return [prompt.example.columns["n"] for prompt in prompts]


def test_groups_that_agree_make_way_for_others(tiny: LanguageModel) -> None:
    """Groups that differ stay in their places; groups that differ replace the others."""
    plain = build_collector(tiny, reward_odd_groups_unequally, resample=0).collect(1)
    batch = build_collector(tiny, reward_odd_groups_unequally, resample=8).collect(1)
    first, kept = list_numbers(plain.rollout.prompts), list_numbers(batch.rollout.prompts)
    assert any(n % 2 == 0 for n in first)
    assert all(n % 2 for n in kept)
    assert [n for n in first if n % 2] == [k for n, k in zip(first, kept, strict=True) if n % 2]
    assert batch.scores.total_BG.tolist() == [[0, 1, 2, 3]] * 6
    # Each row of the joined rollout is in its own group.
    for b, prompt in enumerate(batch.rollout.prompts):
        for n in range(4 * b, 4 * b + 4):
            tokens = batch.rollout.tokens_NC[n, : batch.rollout.lengths_N[n]].tolist()
            assert tiny.tokenizer.decode(tokens, skip_special_tokens=True) == batch.rollout.texts[n]
        assert prompt.example.answer == str(kept[b])


def test_rewards_that_never_apply_are_told_once(
    tiny: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    silent = build_collector(tiny, lambda samples: [None] * len(samples), resample=0)
    for step in (1, 2):
        silent.collect(step)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("step 1: no completion has any reward")
    assert "reward.mine gave None for all 24" in message
    caplog.clear()
    build_collector(tiny, reward_odd_groups_unequally, resample=0).collect(1)
    assert not caplog.records


def test_what_is_said_is_of_everything_that_was_sampled(tiny: LanguageModel) -> None:
    """The replacement of groups must not make the rewards look better than they are."""
    batch = build_collector(tiny, reward_odd_groups_unequally, resample=8).collect(1)
    extra = batch.metrics["reward/resampled_groups"]
    assert extra > 0
    assert batch.sampled_completions == 4 * (6 + extra)
    share = batch.metrics["reward/zero_variance_groups"]
    assert 0 < share < 1
    odd, even = 1.5, 1.0
    assert batch.metrics["reward/mean"] == pytest.approx((1 - share) * odd + share * even)
    assert batch.sampled_tokens > int(batch.rollout.lengths_N.sum())


def test_a_group_that_differs_by_a_failure_alone_is_drawn_anew(tiny: LanguageModel) -> None:
    """A failure among ones makes no difference; beside a real difference, it hides nothing."""

    def fail_once(samples: Sequence[Sample]) -> list[float | Failure]:
        return [
            Failure("down") if i % 4 == 3 else float(i % 2 and sample.example.columns["n"] % 2)
            for i, sample in enumerate(samples)
        ]

    batch = build_collector(tiny, fail_once, resample=8).collect(1)
    assert all(n % 2 for n in list_numbers(batch.rollout.prompts))
    assert [row[:3] for row in batch.scores.total_BG.tolist()] == [[0, 1, 0]] * 6
    assert batch.scores.total_BG[:, 3].isnan().all()


@pytest.mark.parametrize("rows", [24, 40])
def test_no_prompt_is_drawn_twice_in_a_step(tiny: LanguageModel, rows: int) -> None:
    """Six prompts without a difference, replaced three times, are 24 different prompts."""
    seen: list[int] = []

    def reward_all_equally(samples: Sequence[Sample]) -> list[float]:
        seen.extend(sample.example.columns["n"] for sample in samples[::4])
        return [0.0] * len(samples)

    build_collector(tiny, reward_all_equally, resample=3, rows=rows).collect(2)
    assert len(seen) == len(set(seen)) == 24


def test_prompts_that_are_too_long_make_way_as_they_are_drawn(tiny: LanguageModel) -> None:
    """Every second one is too long; others replace them, none twice, the same ones each time."""
    plain = build_collector(tiny, reward_odd_groups_unequally, resample=3)
    examples = [
        replace(p.example, question=p.example.question + " please" * 50 * (n % 2))
        for n, p in enumerate(plain.prompts)
    ]
    format = PromptFormat(None, (), False, {}, 40)
    drawn = LazyPrompts(
        [LazyPromptSet(examples, format, frozenset(["What is 4 + 5?"]), "")], tiny.tokenizer
    )
    lazy = replace(plain, prompts=drawn)
    batches = [lazy.collect(step) for step in (1, 2, 1)]
    for batch in batches:
        found = list_numbers(batch.rollout.prompts)
        assert len(set(found)) == 6
        assert all(n % 2 == 0 and n != 4 for n in found)
    assert batches[0].rollout.texts == batches[2].rollout.texts
    hopeless = LazyPrompts(
        [LazyPromptSet(examples, replace(format, max_prompt_tokens=2), frozenset(), "")],
        tiny.tokenizer,
    )
    with pytest.raises(RunError, match=r"^none of 1000 training prompts"):
        replace(plain, prompts=hopeless).collect(1)


def test_there_is_an_end_to_drawing_anew(tiny: LanguageModel) -> None:
    """If all groups always agree, `resample` draws follow, then the step uses what it has."""

    def reward_all_equally(samples: Sequence[Sample]) -> list[float]:
        return [0.0] * len(samples)

    batch = build_collector(tiny, reward_all_equally, resample=2).collect(1)
    assert batch.metrics["reward/resampled_groups"] == 12
    assert batch.metrics["reward/zero_variance_groups"] == 1.0
    first = build_collector(tiny, reward_all_equally, resample=0).collect(1)
    assert list_numbers(batch.rollout.prompts) == list_numbers(first.rollout.prompts)


def test_a_step_follows_from_its_number(tiny: LanguageModel) -> None:
    once = build_collector(tiny, reward_odd_groups_unequally, resample=3)
    again = build_collector(tiny, reward_odd_groups_unequally, resample=3)
    once.collect(1)
    a, b = once.collect(2), again.collect(2)
    assert a.rollout.texts == b.rollout.texts
    assert torch.equal(a.rollout.logprobs_NC, b.rollout.logprobs_NC)
    assert a.rollout.texts != once.collect(3).rollout.texts
