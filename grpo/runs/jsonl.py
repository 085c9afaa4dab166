"""Files of JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from grpo.runs.files import write_atomically


def reopen(path: Path, last_step: int | None = None) -> TextIO:
    """A .jsonl file to append to, with its whole lines, up to a step where they have one."""
    kept = [line for line in read_lines(path) if last_step is None or line["step"] <= last_step]
    write_atomically(
        path, lambda aside: aside.write_text("".join(map(encode_line, kept)), encoding="utf-8")
    )
    return path.open("a", encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file; a last one cut short by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline
    return [json.loads(line) for line in lines]


def find_last_values(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last value of each key that has one."""
    found: dict[str, Any] = {}
    for line in lines:
        found |= {key: value for key, value in line.items() if value is not None}
    return found


def encode_line(line: Mapping[str, Any]) -> str:
    """One JSON line; what JSON has no number for (inf, nan) is null."""
    return json.dumps(replace_nonfinite(line), ensure_ascii=False, allow_nan=False) + "\n"


def replace_nonfinite(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with null for what JSON has no number for."""
    return {
        key: replace_nonfinite(value)
        if isinstance(value, Mapping)
        else None
        if is_nonfinite(value)
        else value
        for key, value in content.items()
    }


def is_nonfinite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
