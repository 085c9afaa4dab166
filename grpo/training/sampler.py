"""Samples and scores completions; with several ranks, each does so for some of the prompts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from grpo.parallel import ONE_RANK, Ranks
from grpo.rewards import WeightedReward, compute_scores
from grpo.rollout import Engine
from grpo.training.clock import Clock
from grpo.training.groups import Group, join_rollouts, join_scores
from grpo.types import Prompt, Rollout, Sampling, Scores


@dataclass(frozen=True)
class ScoredRollout:
    """Completions, their scores, and how long both took: the slowest rank's time."""

    rollout: Rollout
    scores: Scores
    rollout_seconds: float = 0.0
    reward_seconds: float = 0.0


@dataclass(frozen=True)
class Sampler:
    """An engine and the rewards of what it samples."""

    engine: Engine
    rewards: Mapping[str, WeightedReward]
    ranks: Ranks = ONE_RANK
    # A context in which the engine has the policy's weights.
    gathered: Callable[[], AbstractContextManager[None]] = nullcontext
    # Rewards are called by one thread at a time: a user's own need not be prepared for more.
    scoring: AbstractContextManager[Any] = field(default_factory=threading.Lock)

    def sample(
        self, prompts: Sequence[Prompt], num_generation: int, sampling: Sampling, seed: int
    ) -> ScoredRollout:
        """Returns scored completions of all prompts, the same on every rank.

        Raises:
            RunError: the engine or a reward failed, on any rank.
        """
        with self.gathered():
            return self._sample(prompts, num_generation, sampling, seed)

    def _sample(
        self, prompts: Sequence[Prompt], num_generation: int, sampling: Sampling, seed: int
    ) -> ScoredRollout:
        if self.ranks.size == 1:
            clock = Clock()
            rollout = self.engine.generate(prompts, num_generation, sampling, seed)
            return self._score(rollout, clock)
        shares = self.ranks.divide([len(prompt.token_ids) for prompt in prompts])

        def sample_share() -> ScoredRollout | None:
            share, clock = shares[self.ranks.index], Clock()
            if not share:
                return None
            rollout = self.engine.generate(prompts, num_generation, sampling, seed, share)
            scored = self._score(rollout, clock)
            # Without prompts: each rank has them, and an own verifier may not be sent.
            return replace(scored, rollout=replace(rollout, prompts=()))

        parts: list[ScoredRollout] = []
        places: dict[int, Group] = {}
        for share, part in zip(shares, self.ranks.gather(sample_share), strict=True):
            if part is not None:
                places |= {b: Group(len(parts), n) for n, b in enumerate(share)}
                own = tuple(prompts[b] for b in share)
                parts.append(replace(part, rollout=replace(part.rollout, prompts=own)))
        groups = [places[b] for b in range(len(prompts))]
        return ScoredRollout(
            join_rollouts([part.rollout for part in parts], groups),
            join_scores([part.scores for part in parts], groups),
            max(part.rollout_seconds for part in parts),
            max(part.reward_seconds for part in parts),
        )

    def _score(self, rollout: Rollout, clock: Clock) -> ScoredRollout:
        """clock: started when the rollout was."""
        rollout_seconds = clock.lap()
        with self.scoring:
            scores = compute_scores(rollout, self.rewards)
        return ScoredRollout(rollout, scores, rollout_seconds, clock.lap())
