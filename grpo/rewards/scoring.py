"""Scores a rollout. A reward that raises stops the run: an error is never a reward of 0."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.config.secrets import redact
from grpo.errors import RunError
from grpo.objective.advantages import weighted_sum
from grpo.types import Failure, Rollout, Sample, Scores

log = logging.getLogger(__name__)

RewardValue = float | None | Failure  # None: the reward doesn't apply to this completion
Reward = Callable[[Sequence[Sample]], Sequence[RewardValue]]


@dataclass(frozen=True)
class WeightedReward:
    """A reward, its weight and the sets that it applies to."""

    function: Reward
    weight: float
    sources: frozenset[str] | None = None  # the sets of a mix that it applies to; None: all

    @property
    def concurrent(self) -> bool:
        """Whether it mostly waits for other processes, so that it can run beside other rewards."""
        return bool(getattr(self.function, "concurrent", False))

    def applies_to(self, sample: Sample) -> bool:
        return self.sources is None or sample.example.source in self.sources

    def close(self) -> None:
        """Ends the processes and threads that the reward may have started."""
        if hasattr(self.function, "close"):
            self.function.close()


class RewardError(RunError):
    """A reward raised, failed for all samples, or didn't return one finite number per sample."""


def compute_scores(rollout: Rollout, rewards: Mapping[str, WeightedReward]) -> Scores:
    """Computes all rewards of all completions, and their weighted sum; NaN if a reward failed.

    Raises:
        RewardError: names the reward and shows the prompt and the completion that caused it.
    """
    samples = to_samples(rollout)
    values = compute_all_rewards(rewards, samples)
    failures = {
        name: {n: redact(v.reason) for n, v in enumerate(values_N) if isinstance(v, Failure)}
        for name, values_N in values.items()
    }
    for name, rows in failures.items():
        warn_failures(name, rows, len(samples))
    parts = {name: as_tensor(values_N) for name, values_N in values.items()}
    weights = {name: reward.weight for name, reward in rewards.items()}
    stacked_R1N = torch.stack(list(parts.values()))[:, None]
    total_N = weighted_sum(stacked_R1N, torch.tensor(list(weights.values())))[0]
    total_N[sorted(set().union(*failures.values()))] = torch.nan
    for sample, total in zip(samples, total_N.tolist(), strict=True):
        if math.isinf(total):
            raise RewardError(format_reward_error("*", f"the weighted sum is {total}", sample))
    right_N = torch.tensor(find_right(samples))
    return Scores(
        parts=parts,
        weights=weights,
        total_BG=total_N.view(-1, rollout.num_generation),
        right_BG=right_N.view(-1, rollout.num_generation),
        failures=failures,
        sources=tuple(prompt.example.source for prompt in rollout.prompts),
    )


def compute_all_rewards(
    rewards: Mapping[str, WeightedReward], samples: Sequence[Sample]
) -> dict[str, list[RewardValue]]:
    """Computes the values of each reward; concurrent rewards run in threads beside the others."""
    concurrent = {name: reward for name, reward in rewards.items() if reward.concurrent}
    with ThreadPoolExecutor(max_workers=max(1, len(concurrent))) as threads:
        futures = {
            name: threads.submit(compute_reward, name, reward, samples)
            for name, reward in concurrent.items()
        }
        computed = {
            name: compute_reward(name, reward, samples)
            for name, reward in rewards.items()
            if name not in concurrent
        }
        computed |= {name: future.result() for name, future in futures.items()}
    return {name: computed[name] for name in rewards}


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


def compute_reward(
    name: str, reward: WeightedReward, samples: Sequence[Sample]
) -> list[RewardValue]:
    """Computes and checks one reward's values; None for samples that it doesn't apply to.

    Raises:
        RewardError: it raised, or didn't return one finite number, None or failure per sample.
    """
    rows = [n for n, sample in enumerate(samples) if reward.applies_to(sample)]
    scored = [samples[n] for n in rows]
    if not scored:
        return [None] * len(samples)
    try:
        values = list(reward.function(scored))
    except Exception as error:
        culprit = find_raising_sample(reward.function, scored)
        raise RewardError(
            format_reward_error(name, f"it raised {type(error).__name__}: {error}", culprit)
        ) from error
    if len(values) != len(scored):
        what = f"it returned {len(values)} values for {len(scored)} completions"
        raise RewardError(format_reward_error(name, what, scored[0]))
    for value, sample in zip(values, scored, strict=True):
        if not (value is None or isinstance(value, Failure) or is_finite_number(value)):
            raise RewardError(
                format_reward_error(name, f"it returned {value!r}, not a finite number", sample)
            )
    by_row = dict(zip(rows, values, strict=True))
    return [by_row.get(n) for n in range(len(samples))]


def find_right(samples: Sequence[Sample], *, leniently: bool = False) -> list[bool]:
    """Returns for each completion whether the data set's own verifier gives it 1.

    If the verifier fails for a completion, it is not counted as right, and the log says so.

    Args:
        leniently: an answer counts anywhere in the completion, if the data set can verify that.

    Raises:
        RewardError: the verifier raised.
    """
    verdicts: list[float | Failure] = []
    for sample in samples:
        lenient = sample.example.lenient if leniently else None
        try:
            verdicts.append(lenient(sample.completion) if lenient else sample.verdict)
        except Exception as error:
            name = "verifier, read leniently" if leniently else "verifier (the data set's own)"
            what = f"it raised {type(error).__name__}: {error}"
            raise RewardError(format_reward_error(name, what, sample)) from error
    reasons = [verdict.reason for verdict in verdicts if isinstance(verdict, Failure)]
    if reasons:
        log.warning(
            "the data set's verifier%s failed for %d of %d completions, which are not counted as "
            "right: %s",
            ", read leniently," if leniently else "", len(reasons), len(samples),
            redact(reasons[0]),
        )  # fmt: skip
    return [not isinstance(verdict, Failure) and verdict >= 1 for verdict in verdicts]


def warn_failures(name: str, rows: Mapping[int, str], count: int) -> None:
    """Warns that a reward could not be computed for some completions."""
    if rows:
        log.warning(
            "reward.%s failed for %d of %d completions, which are not trained on: %s",
            name, len(rows), count, rows[min(rows)],
        )  # fmt: skip


def explain_no_rewards(scores: Scores) -> str:
    """Says that no completion has a reward, and none failed; "" if one has."""
    if not scores.total_BG.isnan().all():
        return ""
    names = ", ".join(f"reward.{name}" for name in scores.parts)
    return (
        f"no completion has any reward, so nothing is learnt: {names} gave None for all "
        f"{scores.total_BG.numel()}, which means that a reward does not apply."
    )


def raise_if_all_failed(rollout: Rollout, scores: Scores) -> None:
    """Raises RewardError if a reward failed wherever it applies, or failures leave no total."""
    for name, rows in scores.failures.items():
        if rows and scores.parts[name].isnan().all():
            first = min(rows)
            what = f"it failed for all {len(rows)} completions, the first one with: {rows[first]}"
            raise RewardError(format_reward_error(name, what, to_samples(rollout)[first]))
    failed = {n: name for name, rows in scores.failures.items() for n in rows}
    if failed and scores.total_BG.isnan().all():
        first = min(failed)
        reason = scores.failures[failed[first]][first]
        what = f"failures leave no completion with a reward, the first one with: {reason}"
        raise RewardError(format_reward_error(failed[first], what, to_samples(rollout)[first]))


def as_tensor(values: Sequence[RewardValue]) -> Tensor:
    """Returns [N] float32, NaN where the reward doesn't apply or failed."""
    return torch.tensor(
        [math.nan if v is None or isinstance(v, Failure) else float(v) for v in values]
    )


def is_finite_number(value: object) -> bool:
    try:
        return math.isfinite(value)  # type: ignore[arg-type]
    except TypeError:
        return False


def find_raising_sample(function: Reward, samples: Sequence[Sample]) -> Sample:
    """Returns the first sample that alone makes a reward raise; else the first sample."""
    for sample in samples:
        try:
            function([sample])
        except Exception:  # noqa: BLE001 - a user's code; the caller reports its error
            return sample
    return samples[0]


def format_reward_error(name: str, what: str, sample: Sample) -> str:
    return (
        f"reward.{name}: {what}.\n"
        f"  prompt:     {sample.prompt!r}\n"
        f"  completion: {sample.completion!r}\n"
        f"  answer:     {sample.answer!r}"
    )
