"""A hook of mkdocs.yml: formulas as MathML, which browsers draw by themselves, without a script."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """The page with each formula that arithmatex marked as MathML."""
    return FORMULA.sub(draw_formula, content)


def draw_formula(formula: re.Match[str]) -> str:
    block = formula[2] == "["
    drawn = convert(html.unescape(formula[3]), display="block" if block else "inline")
    return f"<div>{drawn}</div>" if block else drawn
