"""Errors that a user can do something about: each names the key, the value and what is right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MAX_MESSAGE_CHARS = 400  # characters of what another library says


class ConfigError(Exception):
    """The experiment as asked for can't be run; known before anything expensive starts. Exit 2.

    Attributes:
        key: of the config, or a group; None where no single one is wrong, or it is not known.
        value: that it was given.
        choices: all that would be right, where they can be counted.
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
    """The run had to stop, with what was done so far saved. Exit 1."""


def format_error(error: BaseException) -> str:
    """What an error of another library says, as part of a message of one line."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= MAX_MESSAGE_CHARS else f"{said[:MAX_MESSAGE_CHARS]}…"
