"""Rollout to scores. A reward that fails stops the run: its failure is never a reward of zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.errors import RunError
from grpo.rewards.answer import Task
from grpo.types import Rollout, Sample, Scores

Reward = Callable[[Sequence[Sample]], Sequence[float]]


VERIFIER = Task()


@dataclass(frozen=True)
class WeightedReward:
    function: Reward
    weight: float


class RewardError(RunError):
    """A reward raised, or gave something that is not one finite number a sample."""


def score(rollout: Rollout, rewards: Mapping[str, WeightedReward]) -> Scores:
    """Every reward of every completion, and their weighted sum.

    Raises:
        RewardError: naming the reward and showing the prompt and the completion that did it.
    """
    samples = to_samples(rollout)
    parts = {name: reward_part(name, reward.function, samples) for name, reward in rewards.items()}
    total_N = sum(
        (rewards[name].weight * part_N for name, part_N in parts.items()),
        start=torch.zeros(len(samples)),
    )
    for sample, total in zip(samples, total_N.tolist(), strict=True):
        if not math.isfinite(total):
            raise RewardError(explain("*", f"the weighted sum is {total}", sample))
    verdicts_N = reward_part("verifier (the data set's own)", VERIFIER, samples)
    return Scores(
        parts=parts,
        total_BG=total_N.view(-1, rollout.num_generation),
        right_BG=(verdicts_N >= 1).view(-1, rollout.num_generation),
    )


def to_samples(rollout: Rollout) -> list[Sample]:
    lengths, truncated = rollout.lengths_N.tolist(), rollout.truncated_N.tolist()
    tokens = rollout.tokens_NC.tolist()
    samples = []
    for n, text in enumerate(rollout.texts):
        b = n // rollout.num_generation
        samples.append(
            Sample(
                prompt=rollout.prompts[b].text,
                completion=text,
                token_ids=tuple(tokens[n][: lengths[n]]),
                truncated=truncated[n],
                example=rollout.prompts[b].example,
                group=b,
            )
        )
    return samples


def reward_part(name: str, function: Reward, samples: Sequence[Sample]) -> Tensor:
    """One reward of every sample, [N] float32."""
    try:
        values = list(function(samples))
    except Exception as error:
        culprit = first_to_raise(function, samples)
        raise RewardError(
            explain(name, f"it raised {type(error).__name__}: {error}", culprit)
        ) from error
    if len(values) != len(samples):
        what = f"it gave {len(values)} values for {len(samples)} completions"
        raise RewardError(explain(name, what, samples[0]))
    for value, sample in zip(values, samples, strict=True):
        if not is_finite_number(value):
            raise RewardError(explain(name, f"it gave {value!r}, not a finite number", sample))
    return torch.tensor([float(value) for value in values])


def is_finite_number(value: object) -> bool:
    try:
        return math.isfinite(value)  # type: ignore[arg-type]
    except TypeError:
        return False


def first_to_raise(function: Reward, samples: Sequence[Sample]) -> Sample:
    """The sample that makes a reward raise on its own; the first where none does."""
    for sample in samples:
        try:
            function([sample])
        except Exception:  # noqa: BLE001 - a user's code; the error itself is already being told
            return sample
    return samples[0]


def explain(name: str, what: str, sample: Sample) -> str:
    return (
        f"reward.{name}: {what}.\n"
        f"  prompt:     {sample.prompt!r}\n"
        f"  completion: {sample.completion!r}\n"
        f"  answer:     {sample.answer!r}"
    )
