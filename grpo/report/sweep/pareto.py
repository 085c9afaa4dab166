"""Several objectives at once: the Pareto front, the jobs that no other job dominates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from grpo.report.html import COLORS, GRAY
from grpo.report.sweep.layout import apply_layout
from grpo.report.sweep.read import Job, Sweep


def pareto_mask(points: Sequence[Sequence[float]], minimized: Sequence[bool]) -> list[bool]:
    """Returns for each point whether no other is as good in every objective and better in one.

    Args:
        points: [N, objectives].
        minimized: for each objective, whether less is better.
    """
    values = np.asarray(points, dtype=float) * np.where(minimized, -1.0, 1.0)
    as_good = (values[:, None] >= values[None]).all(axis=-1)
    better = (values[:, None] > values[None]).any(axis=-1)
    beaten = np.any(as_good & better, axis=0)
    return [not dominated for dominated in beaten.tolist()]


def draw_pareto_fronts(sweep: Sweep, done: Sequence[Job]) -> go.Figure:
    """Draws the first objective over each of the others; with two, a line joins the front."""
    first, *others = sweep.objectives
    known = [job for job in done if all(name in job.last_values for name in sweep.objectives)]
    points = [[job.last_values[name] for name in sweep.objectives] for job in known]
    minimized = [direction == "minimize" for direction in sweep.objectives.values()]
    best = pareto_mask(points, minimized) if points else []
    figure = make_subplots(1, len(others), horizontal_spacing=0.08)
    for column, other in enumerate(others, start=1):
        for on_front, color in ((False, GRAY), (True, COLORS[0])):
            jobs = [job for job, is_best in zip(known, best, strict=True) if is_best == on_front]
            jobs.sort(key=lambda job: job.last_values[other])
            figure.add_scatter(
                x=[job.last_values[other] for job in jobs],
                y=[job.last_values[first] for job in jobs],
                mode="lines+markers" if on_front and len(others) == 1 else "markers",
                line={"color": color, "dash": "dot"}, marker={"color": color, "size": 10},
                showlegend=False, text=[f"job {job.number}" for job in jobs],
                hovertemplate="%{text}: %{x:.4g}, %{y:.4g}", row=1, col=column,
            )  # fmt: skip
        figure.update_xaxes(title=other, row=1, col=column)
    figure.update_yaxes(title=first, col=1)
    return apply_layout(figure, 420)
