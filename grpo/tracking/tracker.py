"""What a sink is, and the tracker that hands everything to all of them."""

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
    """What a sink may want to know of the run it records."""

    id: str  # kept over resumes
    name: str
    folder: Path
    config: Mapping[str, Any]
    group: str | None  # the sweep this run is a job of
    first_step: int  # 0, or the step a resumed run goes on from
    logged_step: int  # the last step whose metrics stand; -1 for a new run
    total_steps: int
    commit: str | None  # of the code it was run with, where that is a checkout
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
    failed: str  # which rewards could not be worked out, and why; mostly empty
    token_ends: Sequence[int] = ()  # where in the completion each of its tokens ends
    token_kl: Sequence[float] = ()  # its log-probability less the reference's, in nats

    def to_table_row(self) -> dict[str, Any]:
        """What can stand in a table."""
        row = asdict(self)
        parts = row.pop("rewards")
        del row["token_ends"], row["token_kl"]
        return {**row, **{f"reward/{name}": value for name, value in parts.items()}}


class Sink:
    """Somewhere that metrics go. A sink takes what it can show and leaves the rest."""

    def log(self, step: int, metrics: Metrics) -> None:
        """One step's metrics; step 0 is before training."""

    def log_completions(self, rows: Sequence[CompletionRow]) -> None:
        """Some of a step's completions."""

    def log_distributions(self, step: int, values: Mapping[str, Tensor]) -> None:
        """All values of a step behind a mean: of each completion, or of each token."""

    def log_answers(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The greedy completions of an evaluation."""

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        """The end: finished, interrupted or failed."""


class Tracker:
    """All sinks of a run."""

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
    """All of them that are numbers, [T] on the CPU, in the precision that NumPy's bins need.

    A reward that doesn't apply is none.
    """
    values_T = values.detach().flatten().cpu().double()
    return values_T[values_T.isfinite()]


def make_completion_rows(
    step: int, rollout: Rollout, scores: Scores, advantages_BG: Any, num_prompts: int
) -> list[CompletionRow]:
    """The completions of a step's first prompts, whole groups."""
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
    """Each completion of an evaluation, which has no advantage."""
    nothing_BG = scores.total_BG.new_zeros(scores.total_BG.shape)
    return make_completion_rows(0, rollout, scores, nothing_BG, len(rollout.prompts))


def make_answer_rows(rollout: Rollout, scores: Scores) -> list[dict[str, Any]]:
    """Each completion of an evaluation, as a line of its completions.jsonl."""
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
