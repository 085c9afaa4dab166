"""The files of a run, written whole or not at all, and its status."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grpo.config.secrets import redact
from grpo.runs.folder import log

RUNNING = "running"  # also of a run that was killed

FINISHED = "finished"

ENDED = (FINISHED, "pruned")  # the statuses of runs of which nothing is left to do


def read_summary(run: Path) -> dict[str, Any] | None:
    """A run's summary.json; None where there is none that can be read."""
    try:
        content = json.loads((run / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def is_finished(run: Path) -> bool:
    return (read_summary(run) or {}).get("status") == "finished"


def write_atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Writes a file at once: a reader, a kill or another writer meets the old one or the new."""
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    write(aside)
    aside.replace(file)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """As `write_atomically`."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(file, lambda aside: aside.write_text(text, encoding="utf-8"))


def note_failure(run: Path, reason: str) -> None:
    """Says in a run's summary.json that it failed, where it can be written."""
    content = {**(read_summary(run) or {}), "status": "failed", "error": redact(reason)}
    try:
        write_json(run / "summary.json", content)
    except OSError as error:
        log.warning("%s can't be written (%s).", run / "summary.json", error.strerror)
