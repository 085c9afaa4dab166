"""`--json`: one JSON object on standard output, which says what the command came to.

docs/reference/json.md describes it. Whatever else the command prints goes to standard error.
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

SCHEMA = 1  # raised where a field is renamed or removed, or means something else
STATUSES = {0: "done", 1: "failed", 2: "refused", 130: "interrupted"}


@dataclass
class Outcome:
    """What is known of the command under way."""

    command: str | None = None
    folder: Path | None = None  # of the run, evaluation or sweep
    content: Mapping[str, Any] = field(default_factory=dict)  # what a command returns
    error: dict[str, Any] | None = None


CURRENT = Outcome()  # one command a process


def begin_outcome() -> None:
    """Forgets the command before; a test runs several in one process."""
    vars(CURRENT).update(vars(Outcome()))


def note_error(error: BaseException | str) -> None:
    """Keeps an error for the JSON object; of a refusal also key, value and what would be right."""
    CURRENT.error = {"message": redact(str(error))}
    if isinstance(error, ConfigError):
        CURRENT.error |= {
            "key": error.key, "value": error.value, "choices": error.choices,
            "nearest": error.nearest,
        }  # fmt: skip


@contextmanager
def json_output() -> Iterator[None]:
    """Within it nothing reaches standard output; at its end the JSON object does.

    Raises:
        SystemExit: with the exit code of what was done within.
    """
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)  # of this process, and of those that it starts
    code = 0
    try:
        with redirect_stdout(sys.stderr):
            try:
                yield
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except Exception as error:  # noqa: BLE001 - a fault of the program's, told here too
                traceback.print_exc()
                note_error(f"{type(error).__name__}: {error}")
                code = 1
            text = json.dumps(build_object(code), ensure_ascii=False, allow_nan=False)
        os.write(own, f"{text}\n".encode())
    finally:
        sys.stderr.flush()
        os.dup2(own, 1)
        os.close(own)
    raise SystemExit(code)


def build_object(code: int) -> dict[str, Any]:
    """What --json prints."""
    return {
        "schema": SCHEMA,
        "command": CURRENT.command,
        "status": STATUSES.get(code, "failed"),
        "exit_code": code,
        "error": CURRENT.error and plain(CURRENT.error),
        **(plain(describe_outcome()) if code != 2 else {}),
    }


def describe_outcome() -> Mapping[str, Any]:
    """What the command left in its folder, or what it returned."""
    folder = CURRENT.folder
    if folder is None:
        return CURRENT.content
    from grpo.commands.describe import describe_evaluation, describe_run, describe_sweep

    describe = {"train": describe_run, "eval": describe_evaluation, "sweep": describe_sweep}
    found = describe[str(CURRENT.command)](folder)
    name = {"train": "run", "eval": "evaluation", "sweep": "sweep"}[str(CURRENT.command)]
    return {name: found} if found else {}


def plain(value: Any) -> Any:
    """The same in what JSON has: no inf or nan, and texts for what it has no type for."""
    if isinstance(value, Mapping):
        return {str(key): plain(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [plain(own) for own in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    return value if value is None or isinstance(value, bool | int) else redact(str(value))
