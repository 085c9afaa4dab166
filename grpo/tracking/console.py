"""The terminal: a live line during training, or plain lines if the output is a pipe or a file.

A wide terminal shows small charts above the line; a sweep shows its own lines (sweep/view.py).
"""

from __future__ import annotations

import io
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from grpo.runs.stop import has_sweep_view
from grpo.tracking.text_charts import draw_chart
from grpo.tracking.tracker import Metrics, RunInfo, Sink

SECONDS_BETWEEN_LINES = 1.0  # in a pipe
CHARTS = {  # drawn if the terminal has at least the columns and rows below
    "reward": "reward/mean",
    "kl": "kl/mean",
    "length": "completion/length_mean",
}
MIN_CHART_COLUMNS, MIN_CHART_ROWS, CHART_HEIGHT = 100, 16, 4


class Console(Sink):
    """Shows step, reward, KL, length, tokens a second and the time left."""

    def __init__(self, info: RunInfo) -> None:
        self.total_steps = info.total_steps
        self.console = RichConsole()
        self.live: Live | None = None
        self.viewed = has_sweep_view() and self.console.is_terminal
        self.history: dict[str, list[float]] = defaultdict(list)
        if self.console.is_terminal and not self.viewed:
            self.live = Live(console=self.console, auto_refresh=False, transient=True)
            self.live.start()
        self.last_line_time = 0.0
        self.seconds_a_step: float | None = None

    def log(self, step: int, metrics: Metrics) -> None:
        if self.viewed:
            return
        if "eval/accuracy" in metrics:
            self._print(f"evaluation at step {step}: {format_evaluation(metrics)}")
        if "time/step" not in metrics:
            return
        seconds = metrics["time/step"]
        previous = self.seconds_a_step or seconds
        self.seconds_a_step = 0.8 * previous + 0.2 * seconds
        line = format_step_line(step, self.total_steps, metrics, self.seconds_a_step)
        if self.live is not None:
            for name, metric in CHARTS.items():
                if metric in metrics:
                    self.history[name].append(metrics[metric])
            self.live.update(self._render(line), refresh=True)
        elif (
            time.monotonic() - self.last_line_time >= SECONDS_BETWEEN_LINES
            or step == self.total_steps
        ):
            self.last_line_time = time.monotonic()
            self._print(line)

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        if self.live is not None:
            self.live.stop()

    def _render(self, line: str) -> RenderableType:
        below = Text(line, no_wrap=True)
        if self.console.width < MIN_CHART_COLUMNS or self.console.height < MIN_CHART_ROWS:
            return below
        return Group(*draw_charts(self.history, self.console.width), below)

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        self.console.file.flush()


def format_step_line(step: int, total: int, metrics: Metrics, seconds_a_step: float) -> str:
    parts = [f"step {step}/{total}", f"reward {metrics['reward/mean']:.3f}"]
    if "kl/mean" in metrics:
        parts.append(f"kl {metrics['kl/mean']:.4f}")
    parts += [
        f"length {metrics['completion/length_mean']:.0f}",
        f"{metrics['perf/completion_tokens_per_second']:.0f} tokens/s",
        f"{format_duration((total - step) * seconds_a_step)} left",
    ]
    return "  ".join(parts)


def draw_charts(history: Mapping[str, list[float]], width: int) -> list[Text]:
    """Draws curves side by side, each below its name and its first and last value."""
    each = (width - 2 * (len(history) - 1)) // len(history)
    columns = []
    for name, values in history.items():
        title = f"{name} {values[0]:.3g} \u2192 {values[-1]:.3g}"
        rows = draw_chart(values, each, CHART_HEIGHT)
        columns.append([row.ljust(each)[:each] for row in (title, *rows)])
    lines = zip(*columns, strict=True)
    return [Text("  ".join(line), no_wrap=True) for line in lines]


def format_evaluation(metrics: Metrics) -> str:
    return (
        f"accuracy {metrics['eval/sampled_accuracy']:.1%} sampled, "
        f"{metrics['eval/pass_at_k']:.1%} pass@k, {metrics['eval/accuracy']:.1%} greedy"
    )


def format_evaluation_table(reports: Mapping[str, Mapping[str, float]]) -> str:
    """Formats the results of `grpo eval`: a line for all rows and one for each set of a mix."""
    figures = list(next(iter(reports.values())))
    table = Table("rows", *figures, box=box.SIMPLE)
    for name, report in reports.items():
        cells = [f"{v:.1%}" if isinstance(v, float) else str(v) for v in report.values()]
        table.add_row(name, *cells)
    text = io.StringIO()
    RichConsole(width=16 * len(figures) + 30, file=text).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip())


def format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
