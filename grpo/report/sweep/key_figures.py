"""A sweep's figures of its keys: one key at a time, two, and all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from grpo.report.html import COLORS, GRAY
from grpo.report.sweep.layout import apply_layout
from grpo.report.sweep.ranking import format_value
from grpo.report.sweep.read import Job, Sweep

WORST_TO_BEST = [[0, COLORS[1]], [0.5, GRAY], [1, COLORS[0]]]  # visible on light and on dark


def draw_marginals(sweep: Sweep, done: Sequence[Job]) -> go.Figure:
    columns = min(3, len(sweep.keys))
    rows = -(-len(sweep.keys) // columns)
    figure = make_subplots(rows, columns, shared_yaxes=True, horizontal_spacing=0.05)
    for n, key in enumerate(sweep.keys):
        row, column = n // columns + 1, n % columns + 1
        values = [job.values[key] for job in done]
        continuous = all(map(is_number, values)) and len(set(values)) > 8
        figure.add_scatter(
            x=values if continuous else [format_value(value) for value in values],
            y=[job.value for job in done], mode="markers", showlegend=False,
            marker={"color": COLORS[0], "opacity": 0.5, "size": 8},
            text=[f"job {job.number}" for job in done], hovertemplate="%{text}: %{y:.4g}",
            row=row, col=column,
        )  # fmt: skip
        if not continuous:
            order = sort_distinct(values)
            means = [
                np.mean([job.value for job in done if str(job.values[key]) == str(value)])
                for value in order
            ]
            names = [format_value(value) for value in order]
            figure.add_scatter(
                x=names, y=means, mode="lines+markers", showlegend=False,
                line={"color": COLORS[1]}, hovertemplate="mean: %{y:.4g}", row=row, col=column,
            )  # fmt: skip
            figure.update_xaxes(
                type="category", categoryorder="array", categoryarray=names, row=row, col=column
            )
        elif spans_magnitudes(values):
            figure.update_xaxes(type="log", dtick="D2", exponentformat="e", row=row, col=column)
        figure.update_xaxes(title=key, row=row, col=column)
    figure.update_yaxes(title=sweep.objective, col=1)
    return apply_layout(figure, 80 + 260 * rows)


def draw_heatmaps(sweep: Sweep, done: Sequence[Job], pairs: Sequence[tuple[str, str]]) -> go.Figure:
    pairs = pairs[:6]
    columns = min(2, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = make_subplots(rows, columns, horizontal_spacing=0.22, vertical_spacing=0.18)
    low, high = (pick(float(job.value or 0) for job in done) for pick in (min, max))
    for n, (across, down) in enumerate(pairs):
        row, column = n // columns + 1, n % columns + 1
        x_bins, x_of = bin_values([job.values[across] for job in done])
        y_bins, y_of = bin_values([job.values[down] for job in done])
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
    return apply_layout(figure, 80 + 300 * rows)


def bin_values(values: Sequence[Any], max_values: int = 8) -> tuple[list[str], list[int]]:
    """Returns names of the values, or of ranges if there are many, and the index of each value."""
    order = sort_distinct(values)
    if len(order) <= max_values or not all(map(is_number, order)):
        names = [format_value(value) for value in order]
        places = {str(value): n for n, value in enumerate(order)}
        return names, [places[str(value)] for value in values]
    edges = np.unique(np.quantile([float(value) for value in values], np.linspace(0, 1, 6)))
    names = [f"{a:.3g} to {b:.3g}" for a, b in itertools.pairwise(edges)]
    inside = np.searchsorted(edges[1:-1], [float(value) for value in values], side="right")
    return names, [int(n) for n in inside]


def draw_parallel_coordinates(sweep: Sweep, done: Sequence[Job]) -> go.Figure:
    dimensions = []
    for key in sweep.keys:
        values = [job.values[key] for job in done]
        order = sort_distinct(values)
        if all(map(is_number, values)) and len(order) > 8:
            dimensions.append({"label": key, **make_dimension(values)})
            continue
        place = {str(value): n for n, value in enumerate(order)}
        dimensions.append(
            {
                "label": key,
                "values": [place[str(value)] for value in values],
                "tickvals": list(range(len(order))),
                "ticktext": [format_value(value) for value in order],
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
    apply_layout(figure, 420)
    figure.update_layout(margin={"l": 80, "r": 40, "t": 70, "b": 30})
    return figure


def make_dimension(values: Sequence[float]) -> dict[str, Any]:
    """Makes an axis of numbers; uses their logarithms if they span more than a factor of ten."""
    if not spans_magnitudes(values):
        return {"values": list(values)}
    low, high = min(values), max(values)
    powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    return {
        "values": [math.log10(value) for value in values],
        "tickvals": list(powers),
        "ticktext": [f"{10.0**power:g}" for power in powers],
    }


def spans_magnitudes(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > 10


def sort_distinct(values: Sequence[Any]) -> list[Any]:
    """Sorts the distinct values: numbers by size, then the rest by name."""
    distinct = {str(value): value for value in values}.values()
    return sorted(distinct, key=lambda v: (not is_number(v), v if is_number(v) else 0, str(v)))


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
