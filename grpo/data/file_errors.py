"""The errors of data files, each of which names its file."""

from __future__ import annotations

import json
from pathlib import Path

from grpo.errors import ConfigError


def file_error(file: Path, problem: str) -> ConfigError:
    """Returns the error that this file or folder, as `dataset.path`, has a problem."""
    return ConfigError(f"dataset.path={file}: {problem}", key="dataset.path", value=file)


def json_error(error: Exception, file: Path, line: int | None = None) -> ConfigError:
    """Returns the error that text of the file is not UTF-8, not JSON or too deep.

    Args:
        line: the number of the one line that was read; None: the whole file was.
    """
    if isinstance(error, UnicodeDecodeError):
        number = line or error.object.count(b"\n", 0, error.start) + 1
        return file_error(file, f"line {number} is not UTF-8 text ({error.reason}).")
    if isinstance(error, json.JSONDecodeError):
        return file_error(file, f"line {line or error.lineno} is not JSON ({error.msg}).")
    return file_error(file, f"line {line}: {error}." if line else f"{error}.")
