"""Reads and writes overrides and flags of Hydra's command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from grpo.config.suggest import suggest_names
from grpo.errors import ConfigError

LOCATION_KEYS = ("resume", "hydra.run.dir", "checkpoint")  # where a run goes, not what it is


def quote_value(value: object) -> str:
    """Quotes a value so that an override may contain it, whatever its characters."""
    inside = str(value).replace("'", "\\'")
    return f"'{inside}'"


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits arguments by Hydra's own parser: flags with their values, and `key=value` overrides.

    Raises:
        ConfigError: there is no such flag, or it doesn't take this value.
    """
    parser = get_args_parser()
    parser.error = refuse_flag  # type: ignore[method-assign]
    known, unknown = parser.parse_known_args(list(arguments))
    for word in unknown:
        if word.startswith("-"):
            flags = [option for option in parser._option_string_actions if option.startswith("--")]
            raise ConfigError(
                f"{word}: no such flag{suggest_names(word, flags) or '.'} grpo --help names them."
            )
    overrides = [*known.overrides, *(word for word in unknown if not word.startswith("-"))]
    return overrides, [word for word in arguments if word not in overrides]


def refuse_flag(message: str) -> NoReturn:
    raise ConfigError(f"{message.removeprefix('argument ')}. grpo --help names the flags.")


def parse_key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def find_value(key: str, overrides: Sequence[str]) -> str | None:
    """Returns the last value given to a key."""
    values = [o.partition("=")[2] for o in overrides if parse_key(o) == key]
    return values[-1].strip("'\"") if values else None


def merge_overrides(past: Sequence[str], given: Sequence[str]) -> list[str]:
    """Returns the past overrides that are not given again, then the new ones.

    A key that the run added with + needs no + when it is given again.
    """
    renewed = {parse_key(override) for override in given} | set(LOCATION_KEYS)
    added = {parse_key(o): parse_prefix(o) for o in past if parse_prefix(o).startswith("+")}
    return [o for o in past if parse_key(o) not in renewed] + [
        f"{added.get(parse_key(o), '') if not parse_prefix(o) else ''}{o}"
        for o in given
        if not (parse_prefix(o) == "~" and parse_key(o) in added)  # with the past one it is gone
    ]


def parse_prefix(override: str) -> str:
    """Returns the prefix by which an override adds or deletes a key: +, ++, ~; "" if none."""
    return override[: len(override) - len(override.lstrip("+~"))]


def has_config_dir(flags: Sequence[str]) -> bool:
    return any(flag.startswith(("--config-dir", "-cd")) for flag in flags)
