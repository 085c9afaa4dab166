"""A sweep's figures, drawn with Plotly."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from grpo.report.html import COLORS, GRAY
from grpo.report.sweep.key_figures import draw_heatmaps, draw_marginals, draw_parallel_coordinates
from grpo.report.sweep.layout import apply_layout
from grpo.report.sweep.pareto import draw_pareto_fronts
from grpo.report.sweep.ranking import Ranking, Setting
from grpo.report.sweep.read import Job, Sweep

STATUS_COLORS = {
    "finished": "#059669",
    "pruned": "#d97706",
    "failed": "#dc2626",
    "killed": "#7f1d1d",
}
MAX_COLORED_SETTINGS = 8  # settings with a colour of their own; the others are gray
MAX_RANKED_SETTINGS = 25


def draw_figures(
    sweep: Sweep, ranking: Ranking, importances: Mapping[str, float]
) -> Iterator[tuple[str, str, go.Figure]]:
    """Yields the title, the meaning and the figure of each figure that has data.

    One function despite its length: it lists the page's figures in their order.
    """
    done = [job for job in sweep.jobs if job.value is not None]
    if ranking.settings:
        yield (
            "Settings, best first",
            "Mean over seeds, its 95% interval, and each seed.",
            draw_ranking(sweep, ranking),
        )
    if sweep.keys and done:
        yield (
            "The objective by each key",
            "A point for each job; the line joins the means.",
            draw_marginals(sweep, done),
        )
    pairs = list(itertools.combinations(sweep.keys, 2))
    if pairs and done:
        yield (
            "Two keys at a time",
            "The mean objective of each pair of values.",
            draw_heatmaps(sweep, done, pairs),
        )
    if importances:
        yield (
            "What matters",
            "The share of the objective's variance that each key explains (fANOVA). The seed's is "
            "chance.",
            draw_importances(importances),
        )
    if len(sweep.keys) > 1 and len(done) > 1:
        yield (
            "All keys at once",
            "A line for each job; drag along an axis to select jobs.",
            draw_parallel_coordinates(sweep, done),
        )
    if any(len(job.evaluations) > 1 for job in sweep.jobs):
        yield (
            "Learning curves",
            "The objective at each evaluation: mean and range over a setting's seeds.",
            draw_learning_curves(sweep, ranking),
        )
    if len(sweep.objectives) > 1 and done:
        yield (
            "The objectives against each other",
            "A point for each job. In blue the Pareto front: jobs that no other one dominates.",
            draw_pareto_fronts(sweep, done),
        )
    if any("kl/mean" in job.last_values for job in done) and not sweep.minimized:
        yield (
            "Reward against KL",
            "Where each job ended. Up and to the left is better: more reward, nearer to the "
            "reference. Without a reference, at kl_weight=0, the KL is not known.",
            draw_kl_frontier(sweep, ranking, done),
        )
    yield (
        "Time and tokens",
        "What each job took, pruned and failed ones included.",
        draw_costs(sweep),
    )


def choose_color(ranking: Ranking, setting: Setting) -> str:
    place = ranking.settings.index(setting)
    return COLORS[place] if place < MAX_COLORED_SETTINGS else GRAY


def draw_ranking(sweep: Sweep, ranking: Ranking) -> go.Figure:
    shown = ranking.settings[:MAX_RANKED_SETTINGS][::-1]
    figure = go.Figure()
    for setting in shown:
        name, color = ranking.format_setting(setting), choose_color(ranking, setting)
        values = list(setting.by_seed.values())
        figure.add_scatter(
            x=values, y=[name] * len(values), mode="markers", showlegend=False,
            marker={"color": color, "opacity": 0.35, "size": 8},
            text=[f"seed {seed}" for seed in setting.by_seed], hovertemplate="%{text}: %{x:.4g}",
        )  # fmt: skip
        spread = setting.interval
        figure.add_scatter(
            x=[setting.mean], y=[name], mode="markers", showlegend=False,
            marker={"color": color, "size": 12, "symbol": "diamond"},
            error_x=None if spread is None else {
                "array": [spread.high - setting.mean], "arrayminus": [setting.mean - spread.low],
            },
            hovertemplate="mean: %{x:.4g}",
        )  # fmt: skip
    figure.update_xaxes(title=sweep.objective)
    figure.update_yaxes(automargin=True)
    return apply_layout(figure, 120 + 34 * len(shown))


def draw_importances(importances: Mapping[str, float]) -> go.Figure:
    names = list(importances)[::-1]
    figure = go.Figure(
        go.Bar(
            x=[importances[name] for name in names],
            y=names,
            orientation="h",
            marker={"color": [GRAY if name == "seed" else COLORS[0] for name in names]},
            hovertemplate="%{x:.1%}",
        )
    )
    figure.update_xaxes(tickformat=".0%", rangemode="tozero")
    figure.update_yaxes(automargin=True)
    return apply_layout(figure, 110 + 34 * len(names))


def draw_learning_curves(sweep: Sweep, ranking: Ranking) -> go.Figure:
    """Draws finished settings in their colours, and all other jobs behind them in gray."""
    figure = go.Figure()
    first = ranking.settings[:MAX_COLORED_SETTINGS]
    colored = {id(job) for setting in first for job in setting.jobs}
    for job in sweep.jobs:
        if id(job) in colored or len(job.evaluations) < 2:
            continue
        figure.add_scatter(
            x=[line["step"] for line in job.evaluations],
            y=[line[sweep.objective] for line in job.evaluations],
            mode="lines", showlegend=False, opacity=0.6,
            line={"color": GRAY, "width": 1, "dash": "dot" if job.status == "pruned" else "solid"},
            hovertemplate=f"job {job.number}, {job.status}: %{{y:.4g}}",
        )  # fmt: skip
    for setting in first:
        color = choose_color(ranking, setting)
        by_step: dict[int, list[float]] = {}
        for job in setting.jobs:
            for line in job.evaluations:
                by_step.setdefault(line["step"], []).append(line[sweep.objective])
        steps = sorted(step for step, values in by_step.items() if len(values) == len(setting.jobs))
        low, high = ([pick(by_step[step]) for step in steps] for pick in (min, max))
        if len(setting.jobs) > 1:
            figure.add_scatter(
                x=steps + steps[::-1], y=high + low[::-1], fill="toself", fillcolor=color,
                opacity=0.12, line={"width": 0}, showlegend=False, hoverinfo="skip",
            )  # fmt: skip
        figure.add_scatter(
            x=steps, y=[float(np.mean(by_step[step])) for step in steps], mode="lines+markers",
            line={"color": color}, name=ranking.format_setting(setting), hovertemplate="%{y:.4g}",
        )  # fmt: skip
    figure.update_xaxes(title="step")
    figure.update_yaxes(title=sweep.objective)
    return apply_layout(figure, 520, legend={"orientation": "h", "y": -0.18})


def draw_kl_frontier(sweep: Sweep, ranking: Ranking, done: Sequence[Job]) -> go.Figure:
    figure = go.Figure()
    points = [(job.last_values["kl/mean"], job) for job in done if "kl/mean" in job.last_values]
    frontier: list[tuple[float, float]] = []
    for kl, job in sorted(points, key=lambda point: (point[0], -(point[1].value or 0))):
        if not frontier or (job.value or 0) > frontier[-1][1]:
            frontier.append((kl, float(job.value or 0)))
    figure.add_scatter(
        x=[kl for kl, _ in frontier], y=[value for _, value in frontier], mode="lines",
        line={"color": GRAY, "shape": "hv", "dash": "dot"}, name="frontier", hoverinfo="skip",
    )  # fmt: skip
    for setting in ranking.settings:
        own_points = [(kl, job) for kl, job in points if job in setting.jobs]
        if not own_points:
            continue
        place = ranking.settings.index(setting)
        figure.add_scatter(
            x=[kl for kl, _ in own_points], y=[job.value for _, job in own_points],
            mode="markers",
            marker={"color": choose_color(ranking, setting), "size": 10},
            name=ranking.format_setting(setting), showlegend=place < MAX_COLORED_SETTINGS,
            text=[f"job {job.number}" for _, job in own_points],
            hovertemplate="%{text}: KL %{x:.4g}, %{y:.4g}",
        )  # fmt: skip
    figure.update_xaxes(title="KL from the reference at the last step (nats a token)")
    figure.update_yaxes(title=sweep.objective)
    return apply_layout(figure, 520, legend={"orientation": "h", "y": -0.18})


def draw_costs(sweep: Sweep) -> go.Figure:
    figure = make_subplots(1, 2, subplot_titles=("minutes", "completion tokens"))
    names = [f"{job.sweep} {job.number}".strip() for job in sweep.jobs]
    for status in dict.fromkeys(job.status for job in sweep.jobs):
        named_jobs = [
            (name, job) for name, job in zip(names, sweep.jobs, strict=True) if job.status == status
        ]
        minutes = [job.seconds / 60 for _, job in named_jobs]
        tokens = [job.tokens for _, job in named_jobs]
        for column, amounts in enumerate((minutes, tokens), start=1):
            figure.add_bar(
                x=[name for name, _ in named_jobs], y=amounts, name=status, legendgroup=status,
                showlegend=column == 1, marker={"color": STATUS_COLORS.get(status, GRAY)},
                text=[f"{int(job.last_values.get('step', 0))} steps" for _, job in named_jobs],
                textposition="none",
                hovertemplate="job %{x}: %{y:.3g}, %{text}", row=1, col=column,
            )  # fmt: skip
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=names, title="job")
    return apply_layout(figure, 360, legend={"orientation": "h", "y": -0.25})
