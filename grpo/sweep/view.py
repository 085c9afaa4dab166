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
from grpo.runs.stop import VIEW
from grpo.sweep.folder import Standing, read_record, standing
from grpo.tracking.charts import chart
from grpo.tracking.console import duration

LOOKS_A_SECOND = 0.5
CHART_WIDTH = 24
MOST_FAILURES = 3  # whose reasons are shown; all are told at the end


@dataclass(frozen=True)
class Course:
    """How far a job has come."""

    job: Standing
    step: int
    total_steps: int
    rewards: list[float]

    @property
    def share(self) -> float:
        return self.step / self.total_steps if self.total_steps else 0.0


@contextmanager
def viewed(
    folder: Path,
    total: int,
    value_of: Callable[[Standing], float | None],
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
    view = View(folder, total, value_of, minimized)
    os.environ[VIEW] = str(os.getpid())
    live = Live(
        get_renderable=lambda: view.shown(console.width),
        refresh_per_second=LOOKS_A_SECOND,
        console=console,
        transient=True,
    )
    try:
        with live:
            yield
    finally:
        del os.environ[VIEW]


class View:
    """What the terminal shows, read from the jobs' folders."""

    def __init__(
        self,
        folder: Path,
        total: int,
        value_of: Callable[[Standing], float | None],
        minimized: bool,
    ) -> None:
        self.folder, self.total = folder, total
        self.value_of, self.minimized = value_of, minimized
        self.ended: dict[int, tuple[Standing, float | None]] = {}
        self.left: dict[int, tuple[int, Course]] = {}  # to be run again: when it ended, how far
        for own in self.look().begun:
            if not own.ended:
                self.left[own.number] = touched(own), course(own)
        self.started = time.monotonic()
        self.work_before = self.look().work

    def look(self) -> Look:
        record = read_record(self.folder)
        found = Look(record.jobs if record else [])
        for number, job in enumerate(found.overrides):
            if number in self.ended:
                found.begun.append(self.ended[number][0])
            elif job and (own := standing(self.folder, number)).status != "none":
                found.begun.append(own)
                if own.status == RUNNING:
                    found.running.append(course(own))
                elif own.status in ENDED:
                    self.ended[number] = own, self.value_of(own)
                elif number in self.left and touched(own) == self.left[number][0]:
                    found.left.append(self.left[number][1])
        return found

    def shown(self, width: int) -> Group:
        look = self.look()
        counts = Counter(own.status for own in look.begun)
        counts.subtract(own.job.status for own in look.left)
        counts["to run again"] = len(look.left)
        counts["to run"] = self.total - len(look.begun)
        parts = [", ".join(f"{count} {status}" for status, count in counts.items() if count)]
        values = {n: value for n, (_, value) in self.ended.items() if value is not None}
        if values:
            best = (min if self.minimized else max)(values, key=lambda n: values[n])
            overrides = " ".join(look.overrides[best])
            parts.append(f"best {values[best]:.4g}: job {best}, {overrides}")
        now = time.monotonic()
        if look.work > self.work_before:
            each = (now - self.started) / (look.work - self.work_before)
            parts.append(f"{duration((self.total - look.work) * each)} left")
        lines = ["  ".join(parts)]
        lines += [failure(own) for own in look.failed[-MOST_FAILURES:]]
        lines += [progress(own, look.overrides[own.job.number]) for own in look.running]
        return Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))


@dataclass(frozen=True)
class Look:
    """A sweep's jobs as they are just now."""

    overrides: list[list[str]]  # of each job
    begun: list[Standing] = field(default_factory=list)
    running: list[Course] = field(default_factory=list)
    left: list[Course] = field(default_factory=list)  # broken before, and not yet run again

    @property
    def work(self) -> float:
        """How much has been done, in jobs."""
        unfinished = [*self.running, *self.left]
        return len(self.begun) - len(unfinished) + sum(own.share for own in unfinished)

    @property
    def failed(self) -> list[Standing]:
        left = {own.job.number for own in self.left}
        return [own for own in self.begun if own.status == "failed" and own.number not in left]


def course(job: Standing) -> Course:
    steps = [own for own in read_lines(job.folder / "metrics.jsonl") if "time/step" in own]
    rewards = [own["reward/mean"] for own in steps if own["reward/mean"] is not None]
    total = job.summary.get("total_steps", 0)
    return Course(job, steps[-1]["step"] if steps else 0, total, rewards)


def touched(job: Standing) -> int:
    """When its summary was last written; nanoseconds."""
    return (job.folder / "summary.json").stat().st_mtime_ns


def failure(job: Standing) -> str:
    return f"  job {job.number}  failed: {(job.reason.splitlines() or ['no reason given'])[0]}"


def progress(own: Course, overrides: list[str]) -> str:
    (curve,) = chart(own.rewards, CHART_WIDTH)
    reward = f"reward {own.rewards[-1]:.3f}" if own.rewards else "starting"
    words = f"  job {own.job.number}  step {own.step}/{own.total_steps}  {reward}  {curve}  "
    return words + " ".join(overrides)
