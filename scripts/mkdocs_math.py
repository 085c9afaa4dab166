"""A hook of mkdocs.yml: renders formulas as MathML, which browsers draw, with a font for it."""

from __future__ import annotations

import html
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
LOG = '<mo form="prefix" lspace="0.17em" rspace="0.17em">log</mo>'
FONT = "STIXTwoMath-Regular.ttf"  # few systems have one with which MathML looks right


def on_files(files: Files, config: Any) -> Files:
    """Adds the font, which comes in a package."""
    package = find_spec("ziamath")
    assert package is not None
    assert package.origin is not None
    source = Path(package.origin).parent / "fonts" / FONT
    files.append(File.generated(config, f"assets/{FONT}", abs_src_path=str(source)))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """The page with each formula that arithmatex marked as MathML."""
    return FORMULA.sub(draw_formula, content)


def draw_formula(formula: re.Match[str]) -> str:
    block = formula[2] == "["
    drawn = convert(html.unescape(formula[3]), display="block" if block else "inline")
    drawn = drawn.replace("<mi>log</mi>", LOG)
    return f"<div>{drawn}</div>" if block else drawn
