"""A step's metrics of its completions and their rewards; the docs explain each."""

from __future__ import annotations

from grpo.objective.advantages import has_equal_rewards
from grpo.types import Rollout, Scores


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Returns lengths in tokens, and the shares of truncated and of answering completions."""
    lengths_N = rollout.lengths_N.float()
    return {
        "completion/length_mean": float(lengths_N.mean()),
        "completion/length_max": float(lengths_N.max()),
        "completion/truncated": float(rollout.truncated_N.float().mean()),
        "completion/answered": answered_share(rollout),
    }


def answered_share(rollout: Rollout) -> float:
    """Returns the share of completions that hold an answer, right or wrong."""
    size = rollout.num_generation
    answers = [
        rollout.prompts[n // size].example.extract_answer(text)
        for n, text in enumerate(rollout.texts)
    ]
    return sum(answer is not None for answer in answers) / len(answers)


def score_metrics(scores: Scores) -> dict[str, float]:
    """Returns the mean of each reward and of the total, its spread, and shares of groups."""
    right_B = scores.right_BG.float().mean(dim=1)
    applies_BG = scores.total_BG[scores.total_BG.isfinite()]
    return {
        "reward/mean": float(applies_BG.mean()),
        # Over all completions of the step, not within groups.
        "reward/std": float(applies_BG.std()) if len(applies_BG) > 1 else 0.0,
        **{f"reward/{name}": float(part_N.nanmean()) for name, part_N in scores.parts.items()},
        **mean_by_source(scores),
        "reward/failed": float(sum(len(rows) for rows in scores.failures.values())),
        "reward/solved_groups": float((right_B == 1).float().mean()),
        "reward/unsolved_groups": float((right_B == 0).float().mean()),
        "reward/zero_variance_groups": float(has_equal_rewards(scores.total_BG).float().mean()),
    }


def mean_by_source(scores: Scores) -> dict[str, float]:
    """Returns the mean reward of each set of a mix."""
    names = sorted(set(scores.sources) - {""})
    rows = {
        name: [b for b, source in enumerate(scores.sources) if source == name] for name in names
    }
    return {
        f"reward/from_{name}": float(scores.total_BG[rows_b].nanmean())
        for name, rows_b in rows.items()
    }
