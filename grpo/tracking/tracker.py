"""The interface of a sink, and the tracker that passes every call to all sinks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.types import Rollout, Scores

if TYPE_CHECKING:
    from torch import Tensor

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class RunInfo:
    """What a sink needs to know of the run that it records."""

    id: str  # the same after a resume
    name: str
    folder: Path
    config: Mapping[str, Any]
    group: str | None  # the sweep this run is a job of
    first_step: int  # 0, or the step that a resumed run continues from
    logged_step: int  # the last step whose metrics are kept; -1 for a new run
    total_steps: int
    commit: str | None  # of the code, if it runs from a checkout
    job_type: str = "train"  # or eval


@dataclass(frozen=True)
class CompletionRow:
    """A line of completions.jsonl."""

    step: int
    prompt: str
    completion: str
    answer: str
    rewards: Mapping[str, float]  # each part before its weight; NaN where it doesn't apply
    reward: float  # the weighted sum
    advantage: float
    tokens: int
    truncated: bool
    failed: str  # which rewards failed, and why; mostly empty
    token_ends: Sequence[int] = ()  # where in the completion each of its tokens ends
    token_kl: Sequence[float] = ()  # each one's log-probability minus the reference's, in nats

    def to_table_row(self) -> dict[str, Any]:
        """Returns the row for a table: a column for each reward, without the token fields."""
        row = asdict(self)
        parts = row.pop("rewards")
        del row["token_ends"], row["token_kl"]
        return {**row, **{f"reward/{name}": value for name, value in parts.items()}}


class Sink:
    """A destination of metrics. A sink uses what it can show and ignores the rest."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Logs one step's metrics; step 0 is before training."""

    def log_completions(self, rows: Sequence[CompletionRow]) -> None:
        """Logs some of a step's completions."""

    def log_distributions(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Logs all values behind a step's means: one per completion, or per token."""

    def log_answers(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Logs the greedy completions of an evaluation."""

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        """Ends the record; status: finished, pruned, interrupted or failed."""


class Tracker:
    """Passes every call to all sinks of a run."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = sinks

    def log(self, step: int, metrics: Metrics) -> None:
        for sink in self.sinks:
            sink.log(step, metrics)

    def log_completions(self, rows: Sequence[CompletionRow]) -> None:
        for sink in self.sinks:
            sink.log_completions(rows)

    def log_distributions(self, step: int, values: Mapping[str, Tensor]) -> None:
        for sink in self.sinks:
            sink.log_distributions(step, values)

    def log_answers(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for sink in self.sinks:
            sink.log_answers(step, rows)

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        for sink in self.sinks:
            sink.close(status, summary)


def select_finite(values: Tensor) -> Tensor:
    """Returns the finite values, [T] on the CPU, in float64, which NumPy's bins need.

    A reward that doesn't apply is NaN, so it is left out.
    """
    values_T = values.detach().flatten().cpu().double()
    return values_T[values_T.isfinite()]


def make_completion_rows(
    step: int, rollout: Rollout, scores: Scores, advantages_BG: Any, num_prompts: int
) -> list[CompletionRow]:
    """Makes rows of the completions of a step's first prompts, in whole groups."""
    count = min(num_prompts, len(rollout.prompts)) * rollout.num_generation
    totals, advantages = scores.total_BG.flatten().tolist(), advantages_BG.flatten().tolist()
    parts = {name: part_N.tolist() for name, part_N in scores.parts.items()}
    lengths, truncated = rollout.lengths_N.tolist(), rollout.truncated_N.tolist()
    return [
        CompletionRow(
            step=step,
            prompt=rollout.prompts[n // rollout.num_generation].text,
            completion=rollout.texts[n],
            answer=rollout.prompts[n // rollout.num_generation].example.answer,
            rewards={name: values[n] for name, values in parts.items()},
            reward=totals[n],
            advantage=advantages[n],
            tokens=lengths[n],
            truncated=truncated[n],
            failed="; ".join(
                f"{name}: {rows[n]}" for name, rows in scores.failures.items() if n in rows
            ),
        )
        for n in range(count)
    ]


def make_evaluation_rows(rollout: Rollout, scores: Scores) -> list[CompletionRow]:
    """Makes a row of each completion of an evaluation; the advantage, which it lacks, is 0."""
    zeros_BG = scores.total_BG.new_zeros(scores.total_BG.shape)
    return make_completion_rows(0, rollout, scores, zeros_BG, len(rollout.prompts))


def make_answer_rows(rollout: Rollout, scores: Scores) -> list[dict[str, Any]]:
    """Makes a line of completions.jsonl of each completion of an evaluation."""
    size = rollout.num_generation
    rows = make_evaluation_rows(rollout, scores)
    return [
        {
            "source": scores.sources[n // size],
            "greedy": size == 1,
            "right": bool(scores.right_BG.flatten()[n]),
            **{
                k: value
                for k, value in row.to_table_row().items()
                if k not in ("step", "advantage")
            },
        }
        for n, row in enumerate(rows)
    ]
