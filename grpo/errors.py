"""Errors that a user can act on: each names the key, its value and what would be right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MAX_MESSAGE_CHARS = 400  # characters of what another library says


class ConfigError(Exception):
    """The experiment can't be run as given; raised before anything expensive starts. Exit code 2.

    Attributes:
        key: of the config, or a group; None if no single one is wrong, or it is not known.
        value: the value that the key was given.
        choices: all valid values, if they can be listed.
        nearest: names that were probably meant, the likeliest first.
    """

    def __init__(
        self,
        message: str,
        *,
        key: str | None = None,
        value: Any = None,
        choices: Iterable[str] = (),
        nearest: Iterable[str] = (),
    ) -> None:
        super().__init__(message)
        self.key, self.value = key, value
        self.choices, self.nearest = list(choices), list(nearest)


class RunError(Exception):
    """The run had to stop; what was done so far is saved. Exit code 1."""


def format_error(error: BaseException) -> str:
    """Formats another library's error as a part of a message of one line."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= MAX_MESSAGE_CHARS else f"{said[:MAX_MESSAGE_CHARS]}…"
