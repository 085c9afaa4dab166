"""metrics.jsonl, completions.jsonl, evaluations.jsonl: what every other view can be made from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from grpo.runs.folder import put
from grpo.tracking.tracker import CompletionRow, Metrics, RunInfo, Sink


class JsonlFiles(Sink):
    """Appends a line a step and flushes it; a resumed run first forgets the steps it will redo."""

    def __init__(self, info: RunInfo) -> None:
        self.metrics_file = reopen(info.folder / "metrics.jsonl", info.logged_step)
        self.completions_file = reopen(info.folder / "completions.jsonl", info.first_step)
        self.answers_file = reopen(info.folder / "evaluations.jsonl", info.logged_step)

    def log(self, step: int, metrics: Metrics) -> None:
        self.metrics_file.write(encode({"step": step, **metrics}))
        self.metrics_file.flush()

    def completions(self, rows: Sequence[CompletionRow]) -> None:
        for row in rows:
            tokens = {"token_ends": list(row.token_ends), "token_kl": list(row.token_kl)}
            self.completions_file.write(encode({**row.flat(), **tokens}))
        self.completions_file.flush()

    def answers(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self.answers_file.writelines(encode({"step": step, **row}) for row in rows)
        self.answers_file.flush()

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        self.metrics_file.close()
        self.completions_file.close()
        self.answers_file.close()


def reopen(path: Path, last_step: int | None = None) -> TextIO:
    """A .jsonl file to append to, with its whole lines, up to a step where they have one."""
    kept = [line for line in read_lines(path) if last_step is None or line["step"] <= last_step]
    put(path, lambda aside: aside.write_text("".join(map(encode, kept)), encoding="utf-8"))
    return path.open("a", encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file; a last one cut short by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline
    return [json.loads(line) for line in lines]


def last_values(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last value of each key that has one."""
    found: dict[str, Any] = {}
    for line in lines:
        found |= {key: value for key, value in line.items() if value is not None}
    return found


def encode(line: Mapping[str, Any]) -> str:
    """One JSON line; what JSON has no number for (inf, nan) is null."""
    return json.dumps(finite(line), ensure_ascii=False, allow_nan=False) + "\n"


def finite(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with null for what JSON has no number for."""
    return {
        key: finite(value) if isinstance(value, Mapping) else None if is_broken(value) else value
        for key, value in content.items()
    }


def is_broken(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
