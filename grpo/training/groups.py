"""Groups of completions: those of several rollouts, chosen and joined to one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from grpo.models.padding import pad_right
from grpo.types import Rollout, Scores


@dataclass(frozen=True)
class Group:
    """One prompt's completions in one of a step's rollouts, both by index."""

    rollout: int
    prompt: int


def join_rollouts(rollouts: Sequence[Rollout], groups: Sequence[Group]) -> Rollout:
    """Joins the groups into one rollout, in their order; returns a single rollout as it is."""
    if len(rollouts) == 1:
        return rollouts[0]
    size = rollouts[0].num_generation
    rows = [(rollouts[g.rollout], g.prompt * size + i) for g in groups for i in range(size)]
    lengths = {id(rollout): rollout.lengths_N.tolist() for rollout in rollouts}
    tokens_NC, lengths_N = pad_right([r.tokens_NC[n, : lengths[id(r)][n]] for r, n in rows], 0)
    logprobs_NC, _ = pad_right([r.logprobs_NC[n, : lengths[id(r)][n]] for r, n in rows], 0.0)
    return Rollout(
        prompts=tuple(rollouts[g.rollout].prompts[g.prompt] for g in groups),
        tokens_NC=tokens_NC,
        logprobs_NC=logprobs_NC,
        lengths_N=lengths_N,
        truncated_N=torch.stack([r.truncated_N[n] for r, n in rows]),
        texts=tuple(r.texts[n] for r, n in rows),
        exact_logprobs=all(rollout.exact_logprobs for rollout in rollouts),
    )


def join_scores(scores: Sequence[Scores], groups: Sequence[Group]) -> Scores:
    """Joins the scores of the groups, in their order; returns a single rollout's as they are."""
    if len(scores) == 1:
        return scores[0]
    size = scores[0].total_BG.shape[1]
    rows = [(scores[g.rollout], g.prompt * size + i) for g in groups for i in range(size)]
    return Scores(
        parts={
            name: torch.stack([part.parts[name][n] for part, n in rows]) for name in scores[0].parts
        },
        weights=scores[0].weights,
        total_BG=torch.stack([scores[g.rollout].total_BG[g.prompt] for g in groups]),
        right_BG=torch.stack([scores[g.rollout].right_BG[g.prompt] for g in groups]),
        failures={
            name: {
                row: part.failures[name][n]
                for row, (part, n) in enumerate(rows)
                if n in part.failures[name]
            }
            for name in scores[0].failures
        },
        sources=tuple(scores[g.rollout].sources[g.prompt] for g in groups),
    )
