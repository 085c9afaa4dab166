"""A run's charts, by section; several runs are drawn in the same charts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

from grpo.config.metric_names import REWARD_METRICS
from grpo.report.html import COLORS, Figure
from grpo.report.run.read import Run
from grpo.tracking.text_charts import average_bins, split_into_bins

MAX_POINTS = 1000  # of a line; with more steps, each point is the mean of several
DASHES = ("solid", "dot", "dash", "dashdot")
MIN_SMOOTHED_STEPS = 50  # steps from which a noisy line gets its running mean


@dataclass(frozen=True)
class Chart:
    """One or several metrics in one picture."""

    name: str
    meaning: str
    metrics: tuple[str, ...]
    percent: bool = False
    log: bool = False
    stacked: bool = False
    from_zero: bool = False
    compared: tuple[str, ...] = ()  # metrics drawn for several runs; empty: the first metric


CHART_SECTIONS: dict[str, tuple[Chart, ...]] = {
    "Did it learn": (
        Chart("Reward", "Mean over a step's completions.", ("reward/mean",)),
        Chart(
            "Accuracy",
            "Right answers to the evaluation rows: greedy, sampled, and any of the samples.",
            ("eval/accuracy", "eval/sampled_accuracy", "eval/pass_at_k"),
            percent=True,
            compared=("eval/sampled_accuracy", "eval/accuracy"),
        ),
        Chart("Parts of the reward", "Each before its weight.", ("reward/*",)),
        Chart(
            "Groups",
            "Share of groups: all completions right, none right, all rewards equal (these teach "
            "nothing).",
            ("reward/solved_groups", "reward/unsolved_groups", "reward/zero_variance_groups"),
            percent=True,
        ),
    ),
    "Away from the reference": (
        Chart(
            "KL to the reference",
            "Nats a token, by each estimator; mean is the one in the loss.",
            ("kl/mean", "kl/k1", "kl/k2", "kl/k3", "kl/full"),
        ),
        Chart("Entropy", "Nats a token: how uncertain the policy is.", ("policy/entropy",)),
        Chart("Clipped tokens", "Share of tokens.", ("policy/clip_fraction",), percent=True),
        Chart("Largest ratio", "Of any token, new policy to old.", ("policy/ratio_max",)),
        Chart(
            "Sampler against policy",
            "Nats a token between the sampler's and the trained policy's distribution.",
            ("sampler/kl",),
        ),
    ),
    "Lengths": (
        Chart(
            "Length",
            "Tokens a completion.",
            ("completion/length_mean", "completion/length_max", "eval/length_mean"),
        ),
        Chart(
            "Cut off and answered",
            "Share of completions stopped by max_new_tokens, and of those that hold an answer.",
            ("completion/truncated", "completion/answered"),
            percent=True,
        ),
    ),
    "Optimization": (
        Chart("Loss", "The total and its parts.", ("loss/total", "loss/policy", "loss/kl")),
        Chart("Gradient norm", "Before clipping.", ("optim/grad_norm",), log=True),
        Chart("Learning rate", "Of the step.", ("optim/learning_rate",), from_zero=True),
    ),
    "Time and memory": (
        Chart(
            "Seconds a step",
            "By stage.",
            ("time/rollout", "time/reward", "time/update"),
            stacked=True,
            compared=("time/step",),
        ),
        Chart("Speed", "Completion tokens a second.", ("perf/completion_tokens_per_second",)),
        Chart("Memory", "Peak, in GB.", ("memory/peak_gb",), from_zero=True),
    ),
}


def build_sections(runs: Sequence[Run]) -> Iterator[tuple[str, list[tuple[Chart, Figure]]]]:
    """Yields each section with its charts that have data."""
    for title, charts in CHART_SECTIONS.items():
        drawn = []
        for chart in charts:
            metrics = select_metrics(chart, runs)
            lone = chart.metrics == ("reward/*",) and len(metrics) == 1  # is the reward itself
            if not metrics or lone:
                continue
            drawn.append(
                (
                    chart,
                    draw_runs(runs, chart, metrics)
                    if len(runs) > 1
                    else draw_one_run(runs[0], chart, metrics),
                )
            )
        if drawn:
            yield title, drawn


def select_metrics(chart: Chart, runs: Sequence[Run]) -> list[str]:
    """Returns a chart's metrics that any run has logged."""
    logged = list(dict.fromkeys(name for run in runs for name in run.metrics))
    found = []
    for metric in chart.metrics:
        if metric == "reward/*":
            parts = [name for name in logged if name.startswith("reward/")]
            found += [name for name in parts if name.partition("/")[2] not in REWARD_METRICS]
        elif metric in logged:
            found.append(metric)
    return found


def draw_one_run(run: Run, chart: Chart, metrics: Sequence[str]) -> Figure:
    """Draws a line for each metric of one run."""
    traces = []
    names = [metric.partition("/")[2] for metric in metrics]
    for n, (metric, name) in enumerate(zip(metrics, names, strict=True)):
        label = name if names.count(name) == 1 else metric
        traces += make_traces(run, chart, metric, COLORS[n % len(COLORS)], label)
    return {"data": traces, "layout": make_layout(chart, legend=len(metrics) > 1)}


def draw_runs(runs: Sequence[Run], chart: Chart, metrics: Sequence[str]) -> Figure:
    """Draws the compared metrics of several runs: a color for each run, a dash for each metric."""
    compared = [metric for metric in chart.compared if any(metric in run.metrics for run in runs)]
    if chart.metrics == ("reward/*",):
        compared = list(metrics)
    unstacked = replace(chart, stacked=False)  # one run's seconds don't add to another's
    traces = []
    for n, run in enumerate(runs):
        for metric, dash in zip(compared or metrics[:1], cycle(DASHES), strict=False):
            short_name = metric.partition("/")[2]
            name = f"{run.name}: {short_name}" if len(compared) > 1 else run.name
            for trace in make_traces(run, unstacked, metric, COLORS[n % len(COLORS)], name):
                traces.append({**trace, "line": {**trace["line"], "dash": dash}})
    layout = make_layout(chart, legend=True)
    if len(compared) < 2:
        layout["yaxis"]["title"] = {"text": (compared or metrics)[0], "font": {"size": 10}}
    return {"data": traces, "layout": layout}


def make_traces(run: Run, chart: Chart, metric: str, color: str, name: str) -> list[dict[str, Any]]:
    steps, values = downsample(*run.series(metric))
    is_point = metric.startswith("eval/")
    trace = {
        "type": "scatter", "x": steps, "y": values, "name": name,
        "mode": "lines+markers" if is_point or len(steps) < 3 else "lines",
        "line": {"color": color, "width": 2},
        "hovertemplate": "step %{x}: " + ("%{y:.1%}" if chart.percent else "%{y:.4g}"),
    }  # fmt: skip
    if chart.stacked:
        return [{**trace, "stackgroup": "all", "mode": "none", "fillcolor": color}]
    if is_point or len(steps) < MIN_SMOOTHED_STEPS:
        return [trace]
    noisy = {**trace, "opacity": 0.3, "line": {"color": color, "width": 1}, "showlegend": False}
    return [noisy, {**trace, "y": smooth(values), "hoverinfo": "skip", "hovertemplate": None}]


def downsample(
    steps: list[int], values: list[float | None]
) -> tuple[list[int], list[float | None]]:
    """Reduces a line to MAX_POINTS points: means of neighbours, at the first one's step."""
    firsts = [steps[start] for start, _ in split_into_bins(len(steps), MAX_POINTS)]
    return firsts, average_bins(values, MAX_POINTS)


def smooth(values: Sequence[float | None], decay: float = 0.8) -> list[float | None]:
    """Returns exponential running means, unbiased at their start."""
    total = weight = 0.0
    found: list[float | None] = []
    for value in values:
        if value is not None:
            total, weight = decay * total + value, decay * weight + 1
        found.append(float(f"{total / weight:.9g}") if weight else None)  # keeps constants
    return found


def make_layout(chart: Chart, legend: bool) -> dict[str, Any]:
    y: dict[str, Any] = {"automargin": True, "zeroline": False, "exponentformat": "e"}
    if chart.percent:
        y |= {"tickformat": ".0%", "range": [-0.03, 1.03]}
    if chart.from_zero:
        y |= {"rangemode": "tozero"}
    if chart.log:
        y |= {"type": "log", "dtick": 1}
    return {
        "height": 250, "margin": {"l": 50, "r": 12, "t": 8, "b": 36}, "showlegend": legend,
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "xaxis": {"title": {"text": "step", "standoff": 4}, "zeroline": False}, "yaxis": y,
        "hovermode": "x unified" if legend else "closest",
    }  # fmt: skip
