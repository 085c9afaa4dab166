"""Samples and scores the completions of a step; replaces groups with equal rewards."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from grpo.data.order import Order
from grpo.data.prompts import LazyPrompts
from grpo.errors import RunError
from grpo.objective.advantages import has_equal_rewards
from grpo.rewards.scoring import explain_no_rewards, raise_if_all_failed
from grpo.seeds import derive_seed
from grpo.training.groups import Group, join_rollouts, join_scores
from grpo.training.metrics import rollout_metrics, score_metrics
from grpo.training.sampler import Sampler
from grpo.types import Prompt, Rollout, Sampling, Scores

log = logging.getLogger(__name__)
MAX_PROMPT_TRIES = 1000  # prompts tried in search of one that fits


@dataclass(frozen=True)
class Batch:
    """The completions that a step trains on, and the metrics of everything sampled for it."""

    rollout: Rollout
    scores: Scores
    metrics: dict[str, float]
    sampled_tokens: int  # of replaced groups, too
    sampled_completions: int  # of replaced groups, too


@dataclass(frozen=True)
class Collector:
    """Turns prompts into scored completions.

    A group with equal rewards has no advantages, so it trains nothing. DAPO's dynamic sampling
    (2503.14476), eq. 11, draws other prompts in its place, here at most `resample` times. The
    reward metrics cover everything that was sampled, so runs with and without it compare.
    """

    sampler: Sampler
    prompts: Sequence[Prompt]
    order: Order
    sampling: Sampling
    batch_size: int
    num_generation: int
    resample: int
    seed: int
    warnings: list[str] = field(default_factory=list)  # that were logged, each once a run

    def collect(self, step: int) -> Batch:
        """Returns a step's scored completions; the step number seeds all randomness."""
        times = {"time/rollout": 0.0, "time/reward": 0.0}
        rollouts: list[Rollout] = []
        scores: list[Scores] = []

        def sample(indices: Sequence[int]) -> Scores:
            seed = derive_seed(self.seed, step + 500_000_003 * len(rollouts))
            prompts = [self.prompts[i] for i in indices]
            sampled = self.sampler.sample(prompts, self.num_generation, self.sampling, seed)
            rollouts.append(sampled.rollout)
            scores.append(sampled.scores)
            times["time/rollout"] += sampled.rollout_seconds
            times["time/reward"] += sampled.reward_seconds
            return sampled.scores

        already_drawn: set[int] = set()
        first_rows = self.replace_long_prompts(
            step, 0, self.order.draw_batch(step, self.batch_size), already_drawn
        )
        first = sample(first_rows)
        kept = [Group(0, b) for b in range(self.batch_size)]
        uninformative = set(kept) - {Group(0, b) for b in find_informative_groups(first)}
        for attempt in range(self.resample):
            if not uninformative:
                break
            rows = [first_rows[b] for b, group in enumerate(kept) if group in uninformative]
            drawn = self.order.draw_replacements(step, attempt, rows, already_drawn)
            fresh = sample(self.replace_long_prompts(step, attempt + 1, drawn, already_drawn))
            kept = replace_uninformative(
                kept, len(rollouts) - 1, fresh, uninformative, first.sources
            )
            uninformative &= set(kept)
        everything = [
            Group(k, b) for k, part in enumerate(scores) for b in range(len(part.sources))
        ]
        sampled = join_rollouts(rollouts, everything)
        scored = join_scores(scores, everything)
        raise_if_all_failed(sampled, scored)
        if (reason := explain_no_rewards(scored)) and not self.warnings:
            self.warnings.append(reason)
            log.warning("step %d: %s", step, reason)
        metrics = {**score_metrics(scored), **rollout_metrics(sampled), **times}
        if self.resample:
            metrics["reward/resampled_groups"] = float(len(everything) - self.batch_size)
        return Batch(
            rollout=join_rollouts(rollouts, kept),
            scores=join_scores(scores, kept),
            metrics=metrics,
            sampled_tokens=int(sampled.lengths_N.sum()),
            sampled_completions=len(sampled.texts),
        )

    def finish(self) -> None:
        """Ends what is still being collected, at the end of a run: nothing."""

    def replace_long_prompts(
        self, step: int, attempt: int, rows: list[int], already_drawn: set[int]
    ) -> list[int]:
        """Replaces rows whose prompts are too long by others of the same set.

        Adds all rows that it returns to `already_drawn`.

        Raises:
            RunError: MAX_PROMPT_TRIES rows drawn in place of one were all too long.
        """
        already_drawn.update(rows)
        if not isinstance(self.prompts, LazyPrompts):
            return rows
        fitting = []
        for place, row in enumerate(rows):
            candidate, tries = row, 0
            while not self.prompts.fits(candidate):
                tries += 1
                if tries > MAX_PROMPT_TRIES:
                    raise RunError(
                        f"none of {MAX_PROMPT_TRIES} training prompts drawn in a row is short "
                        f"enough; raise dataset.max_prompt_tokens."
                    )
                (candidate,) = self.order.draw_replacements(
                    step, f"{attempt} {place} {tries}", [row], already_drawn
                )
                already_drawn.add(candidate)
            fitting.append(candidate)
        return fitting


def find_informative_groups(scores: Scores) -> list[int]:
    """Returns the indices of the groups whose rewards differ."""
    return (~has_equal_rewards(scores.total_BG))[:, 0].nonzero()[:, 0].tolist()


def replace_uninformative(
    kept: Sequence[Group],
    rollout: int,
    scores: Scores,
    uninformative: set[Group],
    sources: Sequence[str],
) -> list[Group]:
    """Puts a new rollout's informative groups in the places of uninformative ones.

    Args:
        sources: which set of a mix each place belongs to; a new group comes from the same set.
    """
    fresh: dict[str, list[Group]] = {}
    for b in find_informative_groups(scores):
        fresh.setdefault(scores.sources[b], []).append(Group(rollout, b))
    refilled = []
    for group, source in zip(kept, sources, strict=True):
        waiting = fresh.get(source, []) if group in uninformative else []
        refilled.append(waiting.pop(0) if waiting else group)
    return refilled
