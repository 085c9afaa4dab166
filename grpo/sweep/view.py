"""A sweep in the terminal: which jobs run and how they come along, the best so far, time left."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from grpo.runs.files import ENDED, RUNNING
from grpo.runs.jsonl import read_lines
from grpo.runs.stop import VIEW_VARIABLE
from grpo.sweep.folder import JobState, read_job_state, read_record
from grpo.tracking.console import format_duration
from grpo.tracking.text_charts import draw_chart

REFRESHES_PER_SECOND = 0.5
CHART_WIDTH = 24
MAX_FAILURES = 3  # whose reasons are shown; all are told at the end


@dataclass(frozen=True)
class JobProgress:
    """How far a job has come."""

    job: JobState
    step: int
    total_steps: int
    rewards: list[float]

    @property
    def fraction_done(self) -> float:
        return self.step / self.total_steps if self.total_steps else 0.0


@contextmanager
def viewed(
    folder: Path,
    total: int,
    read_objective: Callable[[JobState], float | None],
    minimized: bool,
) -> Iterator[None]:
    """Within it, a terminal shows the sweep; elsewhere its jobs write their own plain lines.

    Args:
        total: jobs in all, begun or not.
        value_of: what a finished job came to.
        minimized: whether less of it is better.
    """
    console = Console()
    if not console.is_terminal:
        yield
        return
    view = View(folder, total, read_objective, minimized)
    os.environ[VIEW_VARIABLE] = str(os.getpid())
    live = Live(
        get_renderable=lambda: view.render_view(console.width),
        refresh_per_second=REFRESHES_PER_SECOND,
        console=console,
        transient=True,
    )
    try:
        with live:
            yield
    finally:
        del os.environ[VIEW_VARIABLE]


class View:
    """What the terminal shows, read from the jobs' folders."""

    def __init__(
        self,
        folder: Path,
        total: int,
        read_objective: Callable[[JobState], float | None],
        minimized: bool,
    ) -> None:
        self.folder, self.total = folder, total
        self.read_objective, self.minimized = read_objective, minimized
        self.ended: dict[int, tuple[JobState, float | None]] = {}
        self.to_rerun: dict[
            int, tuple[int, JobProgress]
        ] = {}  # to be run again: when it ended, how far
        for own in self.take_snapshot().begun:
            if not own.ended:
                self.to_rerun[own.number] = read_summary_mtime(own), read_progress(own)
        self.started = time.monotonic()
        self.jobs_done_before = self.take_snapshot().jobs_done

    def take_snapshot(self) -> SweepSnapshot:
        record = read_record(self.folder)
        found = SweepSnapshot(record.jobs if record else [])
        for number, job in enumerate(found.overrides):
            if number in self.ended:
                found.begun.append(self.ended[number][0])
            elif job and (own := read_job_state(self.folder, number)).status != "none":
                found.begun.append(own)
                if own.status == RUNNING:
                    found.running.append(read_progress(own))
                elif own.status in ENDED:
                    self.ended[number] = own, self.read_objective(own)
                elif (
                    number in self.to_rerun and read_summary_mtime(own) == self.to_rerun[number][0]
                ):
                    found.to_rerun.append(self.to_rerun[number][1])
        return found

    def render_view(self, width: int) -> Group:
        look = self.take_snapshot()
        counts = Counter(own.status for own in look.begun)
        counts.subtract(own.job.status for own in look.to_rerun)
        counts["to run again"] = len(look.to_rerun)
        counts["to run"] = self.total - len(look.begun)
        parts = [", ".join(f"{count} {status}" for status, count in counts.items() if count)]
        values = {n: value for n, (_, value) in self.ended.items() if value is not None}
        if values:
            best = (min if self.minimized else max)(values, key=lambda n: values[n])
            overrides = " ".join(look.overrides[best])
            parts.append(f"best {values[best]:.4g}: job {best}, {overrides}")
        now = time.monotonic()
        if look.jobs_done > self.jobs_done_before:
            each = (now - self.started) / (look.jobs_done - self.jobs_done_before)
            parts.append(f"{format_duration((self.total - look.jobs_done) * each)} left")
        lines = ["  ".join(parts)]
        lines += [format_failure(own) for own in look.failed[-MAX_FAILURES:]]
        lines += [format_progress(own, look.overrides[own.job.number]) for own in look.running]
        return Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))


@dataclass(frozen=True)
class SweepSnapshot:
    """A sweep's jobs as they are just now."""

    overrides: list[list[str]]  # of each job
    begun: list[JobState] = field(default_factory=list)
    running: list[JobProgress] = field(default_factory=list)
    to_rerun: list[JobProgress] = field(
        default_factory=list
    )  # broken before, and not yet run again

    @property
    def jobs_done(self) -> float:
        """How much has been done, in jobs."""
        unfinished = [*self.running, *self.to_rerun]
        return len(self.begun) - len(unfinished) + sum(own.fraction_done for own in unfinished)

    @property
    def failed(self) -> list[JobState]:
        left = {own.job.number for own in self.to_rerun}
        return [own for own in self.begun if own.status == "failed" and own.number not in left]


def read_progress(job: JobState) -> JobProgress:
    steps = [own for own in read_lines(job.folder / "metrics.jsonl") if "time/step" in own]
    rewards = [own["reward/mean"] for own in steps if own["reward/mean"] is not None]
    total = job.summary.get("total_steps", 0)
    return JobProgress(job, steps[-1]["step"] if steps else 0, total, rewards)


def read_summary_mtime(job: JobState) -> int:
    """When its summary was last written; nanoseconds."""
    return (job.folder / "summary.json").stat().st_mtime_ns


def format_failure(job: JobState) -> str:
    return f"  job {job.number}  failed: {(job.reason.splitlines() or ['no reason given'])[0]}"


def format_progress(job_progress: JobProgress, overrides: list[str]) -> str:
    (curve,) = draw_chart(job_progress.rewards, CHART_WIDTH)
    reward = f"reward {job_progress.rewards[-1]:.3f}" if job_progress.rewards else "starting"
    steps = f"step {job_progress.step}/{job_progress.total_steps}"
    words = f"  job {job_progress.job.number}  {steps}  {reward}  {curve}  "
    return words + " ".join(overrides)
