"""The frame of every page: a single HTML file that needs no network and no other file."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

HERE = Path(__file__).parent
Figure = Mapping[str, Any]  # Plotly's: {"data": …, "layout": …}

COLORS = ["#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f"]
GRAY = "#94a3b8"


@dataclass(frozen=True)
class PlacedFigure:
    """A figure's place in a page, where the browser draws it once it is in view."""

    name: str
    meaning: str
    number: int
    height: int  # pixels


@dataclass
class Page:
    """A page's title, and the data that its scripts read."""

    title: str
    figures: list[Figure] = field(default_factory=list)
    payload: dict[str, Any] = field(default_factory=dict)  # unpacked when the page is opened
    blocks: list[str] = field(default_factory=list)  # packed; unpacked when they are needed
    seconds_to_reload: int | None = None  # None: the browser doesn't reload the page

    def place_figure(self, name: str, meaning: str, figure: Figure) -> PlacedFigure:
        """Adds a figure to the page's data."""
        self.figures.append(figure)
        height = int(figure["layout"].get("height", 260))
        return PlacedFigure(name, meaning, len(self.figures) - 1, height)

    def render(self, template: str, scripts: Sequence[str] = (), **values: Any) -> str:
        """Returns the page as HTML, in which every text is escaped.

        Args:
            template: a file in templates/.
            scripts: files in this folder that the page needs, after page.js.
            values: what the template shows.
        """
        content = json.dumps({"figures": self.figures, **self.payload}, allow_nan=False)
        return (
            open_templates()
            .get_template(template)
            .render(
                page=self,
                plotly=load_plotly_script() if self.figures else "",
                content=pack_text(content),
                scripts=scripts,
                **values,
            )
        )


@cache
def open_templates() -> Environment:
    """Opens templates/, which may read a script or a style sheet of this folder unescaped."""
    templates = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    templates.globals["read_file"] = lambda name: Markup((HERE / name).read_text("utf-8"))
    return templates


def pack_text(text: str) -> str:
    """Compresses a text and encodes it in base64, which needs no escaping in HTML."""
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


@cache
def load_plotly_script() -> str:
    """Returns Plotly's script, packed, without importing its package, which takes a second."""
    return pack_text(files("plotly").joinpath("package_data/plotly.min.js").read_text("utf-8"))
