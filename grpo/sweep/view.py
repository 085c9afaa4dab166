"""A sweep in the terminal: which jobs run and how they come along, the best so far, time left."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from grpo.past import ENDED, RUNNING, read_summary
from grpo.sweep.folder import Standing, read_record, standing
from grpo.sweep.stop import VIEW
from grpo.tracking.charts import chart
from grpo.tracking.console import duration
from grpo.tracking.files import read_lines

LOOKS_A_SECOND = 0.5
CHART_WIDTH = 24


@dataclass(frozen=True)
class Course:
    """How a job that runs comes along."""

    job: Standing
    step: int
    total_steps: int
    rewards: list[float]

    @property
    def share(self) -> float:
        return self.step / self.total_steps if self.total_steps else 0.0


@contextmanager
def viewed(
    folder: Path, total: int, value_of: Callable[[Standing], float | None], minimized: bool
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
        self.started = time.monotonic()
        self.work_before = self.work(*self.look())

    def look(self) -> tuple[list[list[str]], list[Standing], list[Course]]:
        """Each job's overrides, all that have begun, and those that run."""
        record = read_record(self.folder)
        jobs = record.jobs if record else []
        begun, courses = [], []
        for number, job in enumerate(jobs):
            if number in self.ended:
                begun.append(self.ended[number][0])
            elif job and (own := standing(self.folder, number)).status != "none":
                begun.append(own)
                if own.status == RUNNING:
                    courses.append(course(own))
                elif own.status in ENDED:
                    self.ended[number] = own, self.value_of(own)
        return jobs, begun, courses

    def work(self, jobs: list[list[str]], begun: list[Standing], courses: list[Course]) -> float:
        """How much has been done, in jobs."""
        return len(begun) - len(courses) + sum(own.share for own in courses)

    def shown(self, width: int) -> Group:
        jobs, begun, courses = looked = self.look()
        counts = Counter(own.status for own in begun)
        counts["to run"] = self.total - len(begun)
        parts = [", ".join(f"{count} {status}" for status, count in counts.items() if count)]
        values = {n: value for n, (_, value) in self.ended.items() if value is not None}
        if values:
            best = (min if self.minimized else max)(values, key=lambda n: values[n])
            parts.append(f"best {values[best]:.4g}: job {best}, {' '.join(jobs[best])}")
        done, now = self.work(*looked), time.monotonic()
        if done > self.work_before:
            each = (now - self.started) / (done - self.work_before)
            parts.append(f"{duration((self.total - done) * each)} left")
        lines = [Text("  ".join(parts), no_wrap=True, overflow="ellipsis")]
        lines += [line(own, jobs[own.job.number]) for own in courses]
        return Group(*lines)


def course(job: Standing) -> Course:
    steps = [own for own in read_lines(job.folder / "metrics.jsonl") if "time/step" in own]
    rewards = [own["reward/mean"] for own in steps if own["reward/mean"] is not None]
    total = (read_summary(job.folder) or {}).get("total_steps", 0)
    return Course(job, steps[-1]["step"] if steps else 0, total, rewards)


def line(own: Course, overrides: list[str]) -> Text:
    (curve,) = chart(own.rewards, CHART_WIDTH)
    reward = f"reward {own.rewards[-1]:.3f}" if own.rewards else "starting"
    words = f"  job {own.job.number}  step {own.step}/{own.total_steps}  {reward}  {curve}  "
    return Text(words + " ".join(overrides), no_wrap=True, overflow="ellipsis")
