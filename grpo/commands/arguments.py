"""Options of the commands that take no overrides."""

from __future__ import annotations

from collections.abc import Sequence

from grpo.errors import ConfigError


def take_option(
    arguments: Sequence[str], name: str, expected: str = "a value"
) -> tuple[list[str], str | None]:
    """The arguments without `name VALUE` or `name=VALUE`, and the value; None: it is not there.

    Args:
        what: it is given, for the message.

    Raises:
        ConfigError: it is there without a value.
    """
    words = list(arguments)
    for place, word in enumerate(words):
        own, equals, value = word.partition("=")
        if own != name:
            continue
        after = place + (1 if equals else 2)
        if after > len(words) or (equals and not value):
            raise ConfigError(f"{name} needs {expected}.")
        return words[:place] + words[after:], value or words[place + 1]
    return words, None
