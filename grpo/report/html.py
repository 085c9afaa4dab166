"""The frame of every page: a single HTML file that needs no network and no other file."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Figure = Mapping[str, Any]  # Plotly's: {"data": …, "layout": …}

COLORS = ["#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f"]
GRAY = "#94a3b8"


class Page:
    """Collects a page's parts in order. Texts must be escaped, or passed in `payload`."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[str] = []
        self.figures: list[Figure] = []
        self.payload: dict[str, Any] = {}  # unpacked when the page is opened
        self.blocks: list[str] = []  # packed; the browser unpacks each when it needs it
        self.head = ""

    def add(self, html: str) -> None:
        self.parts.append(html)

    def reload(self, seconds: int) -> None:
        """Makes the browser reload the page after this time."""
        self.head = f"<meta http-equiv=refresh content={seconds}>"

    def add_figure(self, name: str, meaning: str, figure: Figure) -> str:
        """Adds a figure; returns its place as HTML, where the browser draws it once in view."""
        self.figures.append(figure)
        height = int(figure["layout"].get("height", 260))
        return (
            f"<figure><h3>{escape(name)}</h3><p>{escape(meaning)}</p>"
            f"<div class=plot data-figure={len(self.figures) - 1} style='height:{height}px'></div>"
            f"</figure>"
        )

    def render_html(self, scripts: Sequence[str] = ()) -> str:
        """Returns the page. scripts: files in this folder that it needs, after page.js."""
        code = "\n".join((HERE / name).read_text() for name in ("page.js", *scripts))
        blocks = "".join(
            f"<script type=text/plain class=block>{block}</script>" for block in self.blocks
        )
        data = pack_text(json.dumps({"figures": self.figures, **self.payload}, allow_nan=False))
        plotly = load_plotly_script() if self.figures else ""
        return (
            "<!doctype html><html lang=en><head><meta charset=utf-8>"
            "<meta name=viewport content='width=device-width, initial-scale=1'>"
            f"{self.head}<title>{escape(self.title)}</title>"
            f"<style>{(HERE / 'page.css').read_text()}</style>"
            f"</head><body><main>{''.join(self.parts)}</main>"
            f"<script type=text/plain id=plotly>{plotly}</script>"
            f"<script type=text/plain id=content>{data}</script>"
            f"{blocks}"
            f"<script>{code}</script></body></html>\n"
        )


def pack_text(text: str) -> str:
    """Compresses a text and encodes it in base64, which needs no escaping in HTML."""
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


@cache
def load_plotly_script() -> str:
    """Returns Plotly's script, packed, without importing its package, which takes a second."""
    return pack_text(files("plotly").joinpath("package_data/plotly.min.js").read_text("utf-8"))


def render_table(heads: Sequence[str], rows: Iterable[str]) -> str:
    """Renders a table; rows: <tr>…</tr>"""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return (
        f"<div class=wide><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def render_row(cells: Iterable[str], kind: str = "") -> str:
    inside = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f"<tr{f' class={kind}' if kind else ''}>{inside}</tr>"
