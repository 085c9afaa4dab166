"""The layout that all figures of a sweep share."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go


def apply_layout(figure: go.Figure, height: int, **more: Any) -> go.Figure:
    figure.update_layout(
        template="plotly_white", height=height, margin={"l": 60, "r": 20, "t": 40, "b": 50},
        font={"family": "system-ui, sans-serif", "size": 13},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", **more,
    )  # fmt: skip
    return figure
