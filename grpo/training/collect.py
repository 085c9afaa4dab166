"""What a step learns from: completions and their scores, groups that teach nothing drawn anew."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from grpo.data.order import Order
from grpo.data.prompts import LazyPrompts
from grpo.errors import RunError
from grpo.models.padding import pad_right
from grpo.objective.advantages import has_equal_rewards
from grpo.rewards import WeightedReward, compute_scores
from grpo.rewards.scoring import explain_no_rewards, raise_if_all_failed
from grpo.rollout import Engine
from grpo.seeds import derive_seed
from grpo.training.clock import Clock
from grpo.training.metrics import rollout_metrics, score_metrics
from grpo.types import Prompt, Rollout, Sampling, Scores

log = logging.getLogger(__name__)
MAX_PROMPT_TRIES = 1000  # prompts looked at for one that fits


@dataclass(frozen=True)
class Batch:
    """What a step learns from, and what is said of all that was sampled for it."""

    rollout: Rollout
    scores: Scores
    metrics: dict[str, float]
    sampled_tokens: int  # sampled for it
    sampled_completions: int


@dataclass(frozen=True)
class Collector:
    """Prompts to scored completions.

    Groups whose rewards agree teach nothing: DAPO's dynamic sampling (2503.14476), eq. 11, draws
    other prompts in their place, here at most `resample` times. What is said of the rewards is of
    everything that was sampled, so it stays comparable with a run that keeps them.
    """

    engine: Engine
    rewards: Mapping[str, WeightedReward]
    prompts: Sequence[Prompt]
    order: Order
    sampling: Sampling
    batch_size: int
    num_generation: int
    resample: int
    seed: int
    warnings: list[str] = field(default_factory=list)  # that were logged, each once a run

    def collect(self, step: int) -> Batch:
        """The completions of a step; its number seeds what is random."""
        clock = Clock()
        times = {"time/rollout": 0.0, "time/reward": 0.0}
        rollouts: list[Rollout] = []
        scores: list[Scores] = []

        def sample(indices: Sequence[int]) -> Scores:
            seed = derive_seed(self.seed, step + 500_000_003 * len(rollouts))
            prompts = [self.prompts[i] for i in indices]
            rollouts.append(self.engine.generate(prompts, self.num_generation, self.sampling, seed))
            times["time/rollout"] += clock.lap()
            scores.append(compute_scores(rollouts[-1], self.rewards))
            times["time/reward"] += clock.lap()
            return scores[-1]

        shown: set[int] = set()
        first_rows = self.replace_long_prompts(
            step, 0, self.order.draw_batch(step, self.batch_size), shown
        )
        first = sample(first_rows)
        kept = [Group(0, b) for b in range(self.batch_size)]
        stale = set(kept) - {Group(0, b) for b in find_informative_groups(first)}
        for attempt in range(self.resample):
            if not stale:
                break
            rows = [first_rows[b] for b, group in enumerate(kept) if group in stale]
            drawn = self.order.draw_replacements(step, attempt, rows, shown)
            again = sample(self.replace_long_prompts(step, attempt + 1, drawn, shown))
            kept = replace_uninformative(kept, len(rollouts) - 1, again, stale, first.sources)
            stale &= set(kept)
        everything = [Group(k, b) for k, own in enumerate(scores) for b in range(len(own.sources))]
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

    def replace_long_prompts(
        self, step: int, attempt: int, rows: list[int], shown: set[int]
    ) -> list[int]:
        """The rows, with others of the same set for those whose prompts don't fit; all are `shown`.

        Raises:
            RunError: so few fit that none was found.
        """
        shown.update(rows)
        if not isinstance(self.prompts, LazyPrompts):
            return rows
        found = []
        for place, row in enumerate(rows):
            own, tries = row, 0
            while not self.prompts.fits(own):
                tries += 1
                if tries > MAX_PROMPT_TRIES:
                    raise RunError(
                        f"step {step}: none of {MAX_PROMPT_TRIES} training prompts drawn one after "
                        f"the other is short enough; raise dataset.max_prompt_tokens."
                    )
                (own,) = self.order.draw_replacements(
                    step, f"{attempt} {place} {tries}", [row], shown
                )
                shown.add(own)
            found.append(own)
        return found


@dataclass(frozen=True)
class Group:
    """One prompt's completions, in one of the rollouts of a step."""

    rollout: int
    prompt: int


def find_informative_groups(scores: Scores) -> list[int]:
    """The groups whose rewards differ."""
    return (~has_equal_rewards(scores.total_BG))[:, 0].nonzero()[:, 0].tolist()


def replace_uninformative(
    kept: Sequence[Group],
    rollout: int,
    scores: Scores,
    uninformative: set[Group],
    sources: Sequence[str],
) -> list[Group]:
    """Puts a new rollout's informative groups in the places of those that taught nothing.

    sources: the set of a mix that each place belongs to; it keeps it.
    """
    fresh: dict[str, list[Group]] = {}
    for b in find_informative_groups(scores):
        fresh.setdefault(scores.sources[b], []).append(Group(rollout, b))
    refilled = []
    for group, source in zip(kept, sources, strict=True):
        waiting = fresh.get(source, []) if group in uninformative else []
        refilled.append(waiting.pop(0) if waiting else group)
    return refilled


def join_rollouts(rollouts: Sequence[Rollout], groups: Sequence[Group]) -> Rollout:
    """The named groups as one rollout, in their order; of a single rollout, all of it."""
    if len(rollouts) == 1:
        return rollouts[0]
    size = rollouts[0].num_generation
    rows = [(rollouts[g.rollout], g.prompt * size + i) for g in groups for i in range(size)]
    lengths = {id(own): own.lengths_N.tolist() for own in rollouts}
    tokens_NC, lengths_N = pad_right([r.tokens_NC[n, : lengths[id(r)][n]] for r, n in rows], 0)
    logprobs_NC, _ = pad_right([r.logprobs_NC[n, : lengths[id(r)][n]] for r, n in rows], 0.0)
    return Rollout(
        prompts=tuple(rollouts[g.rollout].prompts[g.prompt] for g in groups),
        tokens_NC=tokens_NC,
        logprobs_NC=logprobs_NC,
        lengths_N=lengths_N,
        truncated_N=torch.stack([r.truncated_N[n] for r, n in rows]),
        texts=tuple(r.texts[n] for r, n in rows),
        exact_logprobs=all(own.exact_logprobs for own in rollouts),
    )


def join_scores(scores: Sequence[Scores], groups: Sequence[Group]) -> Scores:
    """The scores of the named groups, in their order; of a single rollout, all of them."""
    if len(scores) == 1:
        return scores[0]
    size = scores[0].total_BG.shape[1]
    rows = [(scores[g.rollout], g.prompt * size + i) for g in groups for i in range(size)]
    return Scores(
        parts={
            name: torch.stack([own.parts[name][n] for own, n in rows]) for name in scores[0].parts
        },
        weights=scores[0].weights,
        total_BG=torch.stack([scores[g.rollout].total_BG[g.prompt] for g in groups]),
        right_BG=torch.stack([scores[g.rollout].right_BG[g.prompt] for g in groups]),
        failures={
            name: {
                at: own.failures[name][n]
                for at, (own, n) in enumerate(rows)
                if n in own.failures[name]
            }
            for name in scores[0].failures
        },
        sources=tuple(scores[g.rollout].sources[g.prompt] for g in groups),
    )
