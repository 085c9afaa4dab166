"""Files of JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from grpo.runs.files import write_atomically


def reopen(path: Path, last_step: int | None = None) -> TextIO:
    """Opens a .jsonl file to append to; keeps its complete lines, up to `last_step` if given."""
    kept = [line for line in read_lines(path) if last_step is None or line["step"] <= last_step]
    text = "".join(map(encode_line, kept))
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path.open("a", encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the complete lines of a .jsonl file; skips a last line cut short by a kill."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline
    return [json.loads(line) for line in lines]


def find_last_values(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the last value of each key that is not null."""
    found: dict[str, Any] = {}
    for line in lines:
        found |= {key: value for key, value in line.items() if value is not None}
    return found


def encode_line(line: Mapping[str, Any]) -> str:
    """Encodes one JSON line; inf and nan, which JSON doesn't have, become null."""
    return json.dumps(replace_nonfinite(line), ensure_ascii=False, allow_nan=False) + "\n"


def replace_nonfinite(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content with None for inf and nan."""
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
