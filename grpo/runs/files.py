"""A run's status, and its files, each written whole or not at all."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grpo.config.secrets import redact

log = logging.getLogger(__name__)

RUNNING = "running"  # a killed run keeps this status
FINISHED = "finished"
ENDED = (FINISHED, "pruned")  # the statuses of runs with nothing left to do


def read_summary(run: Path) -> dict[str, Any] | None:
    """Reads a run's summary.json; returns None if it is missing or can't be read."""
    try:
        content = json.loads((run / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def is_finished(run: Path) -> bool:
    return (read_summary(run) or {}).get("status") == FINISHED


def write_atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Writes a file atomically: readers, other writers and a kill leave the old one or the new."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    write(temporary)
    temporary.replace(file)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def note_failure(run: Path, reason: str) -> None:
    """Records in a run's summary.json that it failed; warns if the file can't be written."""
    content = {**(read_summary(run) or {}), "status": "failed", "error": redact(reason)}
    try:
        write_json(run / "summary.json", content)
    except OSError as error:
        log.warning("%s can't be written (%s).", run / "summary.json", error.strerror)
