"""A sweep's pictures, as Plotly figures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from grpo.report.shell import COLORS, GRAY
from grpo.report.sweep.front import fronts
from grpo.report.sweep.layout import layout
from grpo.report.sweep.ranking import Ranking, Setting, shown
from grpo.report.sweep.read import Job, Sweep

STATUS_COLORS = {
    "finished": "#059669",
    "pruned": "#d97706",
    "failed": "#dc2626",
    "killed": "#7f1d1d",
}
MOST_SETTINGS = 8  # that have a colour of their own; the rest is gray
MOST_BARS = 25
WORST_TO_BEST = [[0, COLORS[1]], [0.5, GRAY], [1, COLORS[0]]]  # to be seen on light and on dark


def pictures(
    sweep: Sweep, ranking: Ranking, importances: dict[str, float]
) -> Iterator[tuple[str, str, go.Figure]]:
    """Title, what it shows, and the figure; those for which there is something to draw."""
    done = [job for job in sweep.jobs if job.value is not None]
    if ranking.settings:
        yield (
            "Settings, best first",
            "Mean over seeds, its 95% bootstrap interval, and each seed.",
            ranked(sweep, ranking),
        )
    if sweep.keys and done:
        yield (
            "The objective by each key",
            "A point a job; the line joins the means.",
            marginals(sweep, done),
        )
    pairs = list(itertools.combinations(sweep.keys, 2))
    if pairs and done:
        yield (
            "Two keys at a time",
            "The mean objective of each pair of values.",
            heat(sweep, done, pairs),
        )
    if importances:
        yield (
            "What matters",
            "The share of the objective's variance that each key explains (fANOVA). The seed's is "
            "luck.",
            bars(importances),
        )
    if len(sweep.keys) > 1 and len(done) > 1:
        yield (
            "All keys at once",
            "A line a job; drag along an axis to choose some.",
            parallel(sweep, done),
        )
    if any(len(job.evaluations) > 1 for job in sweep.jobs):
        yield (
            "Learning curves",
            "The objective at each evaluation: mean and range over a setting's seeds.",
            curves(sweep, ranking),
        )
    if len(sweep.objectives) > 1 and done:
        yield (
            "The objectives against each other",
            "A point a job. In blue, those that no other one beats in everything.",
            fronts(sweep, done),
        )
    if any("kl/mean" in job.last for job in done) and not sweep.minimized:
        yield (
            "Reward against KL",
            "Where each job ended. Up and to the left is better: more reward, nearer to the "
            "reference. Without a reference, at kl_weight=0, the KL is not known.",
            frontier(sweep, ranking, done),
        )
    yield (
        "Time and tokens",
        "What each job took; pruned and failed ones too.",
        spent(sweep),
    )


def color_of(ranking: Ranking, setting: Setting) -> str:
    place = ranking.settings.index(setting)
    return COLORS[place] if place < MOST_SETTINGS else GRAY


def ranked(sweep: Sweep, ranking: Ranking) -> go.Figure:
    shown_ones = ranking.settings[:MOST_BARS][::-1]
    figure = go.Figure()
    for setting in shown_ones:
        name, color = label(ranking, setting), color_of(ranking, setting)
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
    return layout(figure, 120 + 34 * len(shown_ones))


def label(ranking: Ranking, setting: Setting) -> str:
    return ranking.named(setting)


def in_order(values: Sequence[Any]) -> list[Any]:
    """Distinct values, numbers by size, then the rest by name."""
    distinct = {str(value): value for value in values}.values()
    return sorted(distinct, key=lambda v: (not is_number(v), v if is_number(v) else 0, str(v)))


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def marginals(sweep: Sweep, done: Sequence[Job]) -> go.Figure:
    columns = min(3, len(sweep.keys))
    rows = -(-len(sweep.keys) // columns)
    figure = make_subplots(rows, columns, shared_yaxes=True, horizontal_spacing=0.05)
    for n, key in enumerate(sweep.keys):
        row, column = n // columns + 1, n % columns + 1
        values = [job.values[key] for job in done]
        continuous = all(map(is_number, values)) and len(set(values)) > 8
        figure.add_scatter(
            x=values if continuous else [shown(value) for value in values],
            y=[job.value for job in done], mode="markers", showlegend=False,
            marker={"color": COLORS[0], "opacity": 0.5, "size": 8},
            text=[f"job {job.number}" for job in done], hovertemplate="%{text}: %{y:.4g}",
            row=row, col=column,
        )  # fmt: skip
        if not continuous:
            order = in_order(values)
            means = [
                np.mean([job.value for job in done if str(job.values[key]) == str(value)])
                for value in order
            ]
            names = [shown(value) for value in order]
            figure.add_scatter(
                x=names, y=means, mode="lines+markers", showlegend=False,
                line={"color": COLORS[1]}, hovertemplate="mean: %{y:.4g}", row=row, col=column,
            )  # fmt: skip
            figure.update_xaxes(
                type="category", categoryorder="array", categoryarray=names, row=row, col=column
            )
        elif over_magnitudes(values):
            figure.update_xaxes(type="log", dtick="D2", exponentformat="e", row=row, col=column)
        figure.update_xaxes(title=key, row=row, col=column)
    figure.update_yaxes(title=sweep.objective, col=1)
    return layout(figure, 80 + 260 * rows)


def heat(sweep: Sweep, done: Sequence[Job], pairs: Sequence[tuple[str, str]]) -> go.Figure:
    pairs = pairs[:6]
    columns = min(2, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = make_subplots(rows, columns, horizontal_spacing=0.22, vertical_spacing=0.18)
    low, high = (pick(float(job.value or 0) for job in done) for pick in (min, max))
    for n, (across, down) in enumerate(pairs):
        row, column = n // columns + 1, n % columns + 1
        x_bins, x_of = binned([job.values[across] for job in done])
        y_bins, y_of = binned([job.values[down] for job in done])
        cells: list[list[list[float]]] = [[[] for _ in x_bins] for _ in y_bins]
        for job, x, y in zip(done, x_of, y_of, strict=True):
            cells[y][x].append(float(job.value or 0))
        means = [[float(np.mean(cell)) if cell else None for cell in line] for line in cells]
        figure.add_heatmap(
            x=x_bins, y=y_bins, z=means, zmin=low, zmax=high, colorscale="Viridis",
            text=[["" if mean is None else f"{mean:.3g}" for mean in line] for line in means],
            texttemplate="%{text}", hovertemplate="%{x}, %{y}: %{z:.4g}", showscale=n == 0,
            colorbar={"x": 1.06},
            row=row, col=column,
        )  # fmt: skip
        figure.update_xaxes(title=across, type="category", row=row, col=column)
        figure.update_yaxes(title=down, type="category", row=row, col=column)
    return layout(figure, 80 + 300 * rows)


def binned(values: Sequence[Any], most: int = 8) -> tuple[list[str], list[int]]:
    """Names of the values, or of ranges of them where they are many; and which one each is in."""
    order = in_order(values)
    if len(order) <= most or not all(map(is_number, order)):
        names = [shown(value) for value in order]
        places = {str(value): n for n, value in enumerate(order)}
        return names, [places[str(value)] for value in values]
    edges = np.unique(np.quantile([float(value) for value in values], np.linspace(0, 1, 6)))
    names = [f"{a:.3g} to {b:.3g}" for a, b in itertools.pairwise(edges)]
    inside = np.searchsorted(edges[1:-1], [float(value) for value in values], side="right")
    return names, [int(n) for n in inside]


def bars(importances: dict[str, float]) -> go.Figure:
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
    return layout(figure, 110 + 34 * len(names))


def parallel(sweep: Sweep, done: Sequence[Job]) -> go.Figure:
    dimensions = []
    for key in sweep.keys:
        values = [job.values[key] for job in done]
        order = in_order(values)
        if all(map(is_number, values)) and len(order) > 8:
            dimensions.append({"label": key, **along(values)})
            continue
        place = {str(value): n for n, value in enumerate(order)}
        dimensions.append(
            {
                "label": key,
                "values": [place[str(value)] for value in values],
                "tickvals": list(range(len(order))),
                "ticktext": [shown(value) for value in order],
            }
        )
    outcomes = [job.value for job in done]
    dimensions.append({"label": sweep.objective, "values": outcomes})
    figure = go.Figure(
        go.Parcoords(
            dimensions=dimensions,
            line={
                "color": outcomes, "colorscale": WORST_TO_BEST, "showscale": True,
                "reversescale": sweep.minimized,
            },
        )
    )  # fmt: skip
    layout(figure, 420)
    figure.update_layout(margin={"l": 80, "r": 40, "t": 70, "b": 30})
    return figure


def over_magnitudes(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > 10


def along(values: Sequence[float]) -> dict[str, Any]:
    """Numbers on an axis, by their logarithms where they are of several magnitudes."""
    if not over_magnitudes(values):
        return {"values": list(values)}
    low, high = min(values), max(values)
    powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    return {
        "values": [math.log10(value) for value in values],
        "tickvals": list(powers),
        "ticktext": [f"{10.0**power:g}" for power in powers],
    }


def curves(sweep: Sweep, ranking: Ranking) -> go.Figure:
    """Settings that have finished in their colours, everything else behind them in gray."""
    figure = go.Figure()
    colored = {id(job) for one in ranking.settings[:MOST_SETTINGS] for job in one.jobs}
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
    for setting in ranking.settings[:MOST_SETTINGS]:
        color = color_of(ranking, setting)
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
            line={"color": color}, name=label(ranking, setting), hovertemplate="%{y:.4g}",
        )  # fmt: skip
    figure.update_xaxes(title="step")
    figure.update_yaxes(title=sweep.objective)
    return layout(figure, 520, legend={"orientation": "h", "y": -0.18})


def frontier(sweep: Sweep, ranking: Ranking, done: Sequence[Job]) -> go.Figure:
    figure = go.Figure()
    points = [(job.last["kl/mean"], job) for job in done if "kl/mean" in job.last]
    edge: list[tuple[float, float]] = []
    for kl, job in sorted(points, key=lambda point: (point[0], -(point[1].value or 0))):
        if not edge or (job.value or 0) > edge[-1][1]:
            edge.append((kl, float(job.value or 0)))
    figure.add_scatter(
        x=[kl for kl, _ in edge], y=[value for _, value in edge], mode="lines",
        line={"color": GRAY, "shape": "hv", "dash": "dot"}, name="frontier", hoverinfo="skip",
    )  # fmt: skip
    for setting in ranking.settings:
        own = [(kl, job) for kl, job in points if job in setting.jobs]
        if not own:
            continue
        place = ranking.settings.index(setting)
        figure.add_scatter(
            x=[kl for kl, _ in own], y=[job.value for _, job in own], mode="markers",
            marker={"color": color_of(ranking, setting), "size": 10},
            name=label(ranking, setting), showlegend=place < MOST_SETTINGS,
            text=[f"job {job.number}" for _, job in own],
            hovertemplate="%{text}: KL %{x:.4g}, %{y:.4g}",
        )  # fmt: skip
    figure.update_xaxes(title="KL from the reference at the last step (nats a token)")
    figure.update_yaxes(title=sweep.objective)
    return layout(figure, 520, legend={"orientation": "h", "y": -0.18})


def spent(sweep: Sweep) -> go.Figure:
    figure = make_subplots(1, 2, subplot_titles=("minutes", "completion tokens"))
    names = [f"{job.sweep} {job.number}".strip() for job in sweep.jobs]
    for status in dict.fromkeys(job.status for job in sweep.jobs):
        own = [
            (name, job) for name, job in zip(names, sweep.jobs, strict=True) if job.status == status
        ]
        for column, amounts in enumerate(
            ([job.seconds / 60 for _, job in own], [job.tokens for _, job in own]), start=1
        ):
            figure.add_bar(
                x=[name for name, _ in own], y=amounts, name=status, legendgroup=status,
                showlegend=column == 1, marker={"color": STATUS_COLORS.get(status, GRAY)},
                text=[f"{int(job.last.get('step', 0))} steps" for _, job in own],
                textposition="none",
                hovertemplate="job %{x}: %{y:.3g}, %{text}", row=1, col=column,
            )  # fmt: skip
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=names, title="job")
    return layout(figure, 360, legend={"orientation": "h", "y": -0.25})
