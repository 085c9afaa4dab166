"""A sweep in the terminal: running jobs and their progress, the best so far, the time left."""

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
MAX_FAILURES = 3  # failures that are shown; the end shows all


@dataclass(frozen=True)
class JobProgress:
    """The progress of a job."""

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
    """Within it, a terminal shows the sweep; without a terminal, jobs write their own plain lines.

    Args:
        total: jobs in all, begun or not.
        read_objective: returns the objective of a finished job, or None.
        minimized: whether a lower objective is better.
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
        # Jobs that will run again: when their summary was written, and their progress.
        self.to_rerun: dict[int, tuple[int, JobProgress]] = {}
        for job in self.take_snapshot().begun:
            if not job.ended:
                self.to_rerun[job.number] = read_summary_mtime(job), read_progress(job)
        self.started = time.monotonic()
        self.jobs_done_before = self.take_snapshot().jobs_done

    def take_snapshot(self) -> SweepSnapshot:
        record = read_record(self.folder)
        snapshot = SweepSnapshot(record.jobs if record else [])
        for number, overrides in enumerate(snapshot.overrides):
            if number in self.ended:
                snapshot.begun.append(self.ended[number][0])
            elif overrides and (job := read_job_state(self.folder, number)).status != "none":
                snapshot.begun.append(job)
                if job.status == RUNNING:
                    snapshot.running.append(read_progress(job))
                elif job.status in ENDED:
                    self.ended[number] = job, self.read_objective(job)
                elif (
                    number in self.to_rerun and read_summary_mtime(job) == self.to_rerun[number][0]
                ):
                    snapshot.to_rerun.append(self.to_rerun[number][1])
        return snapshot

    def render_view(self, width: int) -> Group:
        snapshot = self.take_snapshot()
        counts = Counter(job.status for job in snapshot.begun)
        counts.subtract(progress.job.status for progress in snapshot.to_rerun)
        counts["to run again"] = len(snapshot.to_rerun)
        counts["to run"] = self.total - len(snapshot.begun)
        parts = [", ".join(f"{count} {status}" for status, count in counts.items() if count)]
        values = {n: value for n, (_, value) in self.ended.items() if value is not None}
        if values:
            best = (min if self.minimized else max)(values, key=lambda n: values[n])
            overrides = " ".join(snapshot.overrides[best])
            parts.append(f"best {values[best]:.4g}: job {best}, {overrides}")
        now = time.monotonic()
        if snapshot.jobs_done > self.jobs_done_before:
            each = (now - self.started) / (snapshot.jobs_done - self.jobs_done_before)
            parts.append(f"{format_duration((self.total - snapshot.jobs_done) * each)} left")
        lines = ["  ".join(parts)]
        lines += [format_failure(job) for job in snapshot.failed[-MAX_FAILURES:]]
        overrides_of = snapshot.overrides
        lines += [format_progress(p, overrides_of[p.job.number]) for p in snapshot.running]
        return Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))


@dataclass(frozen=True)
class SweepSnapshot:
    """The state of a sweep's jobs at one moment."""

    overrides: list[list[str]]  # of each job
    begun: list[JobState] = field(default_factory=list)
    running: list[JobProgress] = field(default_factory=list)
    to_rerun: list[JobProgress] = field(default_factory=list)  # broken off, not yet run again

    @property
    def jobs_done(self) -> float:
        """The work that is done, in jobs; a job that runs counts in part."""
        unfinished = [*self.running, *self.to_rerun]
        return len(self.begun) - len(unfinished) + sum(job.fraction_done for job in unfinished)

    @property
    def failed(self) -> list[JobState]:
        left = {progress.job.number for progress in self.to_rerun}
        return [job for job in self.begun if job.status == "failed" and job.number not in left]


def read_progress(job: JobState) -> JobProgress:
    steps = [line for line in read_lines(job.folder / "metrics.jsonl") if "time/step" in line]
    rewards = [line["reward/mean"] for line in steps if line["reward/mean"] is not None]
    total = job.summary.get("total_steps", 0)
    return JobProgress(job, steps[-1]["step"] if steps else 0, total, rewards)


def read_summary_mtime(job: JobState) -> int:
    """Returns when the job's summary was last written, in nanoseconds."""
    return (job.folder / "summary.json").stat().st_mtime_ns


def format_failure(job: JobState) -> str:
    return f"  job {job.number}  failed: {(job.reason.splitlines() or ['no reason given'])[0]}"


def format_progress(job_progress: JobProgress, overrides: list[str]) -> str:
    (curve,) = draw_chart(job_progress.rewards, CHART_WIDTH)
    reward = f"reward {job_progress.rewards[-1]:.3f}" if job_progress.rewards else "starting"
    steps = f"step {job_progress.step}/{job_progress.total_steps}"
    text = f"  job {job_progress.job.number}  {steps}  {reward}  {curve}  "
    return text + " ".join(overrides)
