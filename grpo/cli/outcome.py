"""Prints the result of a command with `--json` as one JSON object on standard output.

docs/reference/json.md describes the object. Everything else goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo.config.secrets import redact
from grpo.errors import ConfigError
from grpo.runs.jsonl import is_nonfinite

SCHEMA = 1  # increased if a field is renamed or removed, or changes its meaning
STATUSES = {0: "done", 1: "failed", 2: "refused", 130: "interrupted"}


@dataclass
class Outcome:
    """What is known about the current command."""

    command: str | None = None
    folder: Path | None = None  # of the run, evaluation or sweep
    content: Mapping[str, Any] = field(default_factory=dict)  # what a command returns
    error: dict[str, Any] | None = None


CURRENT = Outcome()  # one command a process


def begin_outcome() -> None:
    """Forgets the previous command; tests run several in one process."""
    vars(CURRENT).update(vars(Outcome()))


def note_error(error: BaseException | str) -> None:
    """Keeps an error for the JSON object; for a refusal also its key, value and valid choices."""
    CURRENT.error = {"message": redact(str(error))}
    if isinstance(error, ConfigError):
        CURRENT.error |= {
            "key": error.key, "value": error.value, "choices": error.choices,
            "nearest": error.nearest,
        }  # fmt: skip


@contextmanager
def json_output() -> Iterator[None]:
    """Within it, standard output goes to standard error; at its end, the JSON object is printed.

    Raises:
        SystemExit: always, with the exit code of the command.
    """
    sys.stdout.flush()
    standard_output = os.dup(1)
    os.dup2(2, 1)  # for this process and those that it starts
    code = 0
    try:
        with redirect_stdout(sys.stderr):
            try:
                yield
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except Exception as error:  # noqa: BLE001 - reported in the object, too
                traceback.print_exc()
                note_error(f"{type(error).__name__}: {error}")
                code = 1
            text = json.dumps(build_object(code), ensure_ascii=False, allow_nan=False)
        os.write(standard_output, f"{text}\n".encode())
    finally:
        sys.stderr.flush()
        os.dup2(standard_output, 1)
        os.close(standard_output)
    raise SystemExit(code)


def build_object(code: int) -> dict[str, Any]:
    """Builds the object that --json prints."""
    return {
        "schema": SCHEMA,
        "command": CURRENT.command,
        "status": STATUSES.get(code, "failed"),
        "exit_code": code,
        "error": CURRENT.error and convert_to_json(CURRENT.error),
        **(convert_to_json(describe_outcome()) if code != 2 else {}),
    }


def describe_outcome() -> Mapping[str, Any]:
    """Describes the folder that the command wrote, or returns what the command returned."""
    folder = CURRENT.folder
    if folder is None:
        return CURRENT.content
    from grpo.commands.describe import describe_evaluation, describe_run, describe_sweep

    describe = {"train": describe_run, "eval": describe_evaluation, "sweep": describe_sweep}
    found = describe[str(CURRENT.command)](folder)
    name = {"train": "run", "eval": "evaluation", "sweep": "sweep"}[str(CURRENT.command)]
    return {name: found} if found else {}


def convert_to_json(value: Any) -> Any:
    """Converts a value to types that JSON has: null for inf and nan, text for other types."""
    if isinstance(value, Mapping):
        return {str(key): convert_to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [convert_to_json(item) for item in value]
    if value is None or is_nonfinite(value):
        return None
    return value if isinstance(value, bool | int | float) else redact(str(value))
