"""Slices as the datasets library writes them: `:5%`, `100:200`, `-128:`, `10%:20%`."""

from __future__ import annotations

import re

from grpo.errors import ConfigError

BOUND = re.compile(r"(-?\d+)(%?)")


def parse_slice(text: str, rows: int, key: str) -> range:
    """Returns the row numbers that `[text]` selects out of `rows` rows.

    Percentages are rounded to the closest row; bounds past the ends are cut; a negative bound
    counts from the end.

    Raises:
        ConfigError: `text` is not a slice or selects no row; the message names `key`.
    """
    start, colon, stop = text.strip().removeprefix("[").removesuffix("]").partition(":")
    # A slice that mixes row numbers and percentages is ambiguous.
    mixed = start.strip() and stop.strip() and ("%" in start) != ("%" in stop)
    if not colon or mixed:
        raise ConfigError(format_slice_error(text, key))
    first = parse_bound(start, rows, 0, text, key)
    last = parse_bound(stop, rows, rows, text, key)
    if first >= last:
        raise ConfigError(f"{key}={text}: selects none of the {rows} rows.", key=key, value=text)
    return range(first, last)


def parse_bound(text: str, rows: int, default: int, slice_text: str, key: str) -> int:
    if not text.strip():
        return default
    match = BOUND.fullmatch(text.strip())
    if match is None:
        raise ConfigError(format_slice_error(slice_text, key))
    number = int(match[1])
    if match[2]:
        if abs(number) > 100:
            raise ConfigError(
                f"{key}={slice_text}: {number}% is more than 100%.", key=key, value=slice_text
            )
        number = round(number * rows / 100)
    if number < 0:
        number += rows
    return min(max(number, 0), rows)


def format_slice_error(text: str, key: str) -> str:
    return f"{key}={text}: not a slice; write it like :5%, 100:200, -128: or 10%:20%."
