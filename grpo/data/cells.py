"""Converts the cells of a table to questions and answers; refuses cells that can't be either."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from grpo.errors import ConfigError

Row = Mapping[str, Any]
# NumPy's name of a narrow float type, by its name in Arrow or in the datasets library.
NARROW_DTYPES = {
    "float": "float32",
    "halffloat": "float16",
    "float32": "float32",
    "float16": "float16",
}


class FloatShortener:
    """Shortens the narrow floats of a row: a float32's 0.1 is 0.1, not 0.10000000149011612."""

    def __init__(self, types: Mapping[str, str]) -> None:
        """types: the type of each column, as named by Arrow or datasets."""
        import numpy

        self.dtypes = {
            name: getattr(numpy, NARROW_DTYPES[kind])
            for name, kind in types.items()
            if kind in NARROW_DTYPES
        }

    def shorten(self, row: Row) -> Row:
        narrow = {name: row[name] for name in self.dtypes if row[name] is not None}
        short = {name: float(str(self.dtypes[name](value))) for name, value in narrow.items()}
        return {**row, **short} if short else row


def read_cell(row: Row, key: str, name: str, number: int) -> Any:
    """Returns the cell of row `number` (from 0) in column `name`, which `dataset.{key}` names.

    Raises:
        ConfigError: there is no such column, or the cell is empty.
    """
    if name not in row:
        raise ConfigError(
            f"dataset.{key}={name}: row {number + 1} has no such column; it has {', '.join(row)}.",
            key=f"dataset.{key}",
            value=name,
        )
    value = row[name]
    # pandas represents a missing value as NaN and writes NaN into JSON and parquet.
    if value is None or is_nan(value) or (isinstance(value, str) and not value.strip()):
        raise ConfigError(f"dataset: row {number + 1} has nothing in column {name!r}.")
    return value


def is_nan(value: Any) -> bool:
    if isinstance(value, Decimal):
        return value.is_nan()
    return isinstance(value, float) and math.isnan(value)


def convert_to_text(value: Any, name: str, number: int) -> str:
    """Converts a cell to text: text stays as it is, numbers and booleans take their Python form.

    Raises:
        ConfigError: the cell is of another type or not finite, so no answer could equal it.
    """
    finite = not isinstance(value, float | Decimal) or math.isfinite(value)
    if not finite or not isinstance(value, str | int | float | Decimal):
        kind = type(value).__name__ if finite else str(value)
        raise ConfigError(
            f"dataset: row {number + 1} has {add_article(kind)} in column {name!r}: "
            f"{str(value)[:60]}. Write it as text or as a number."
        )
    return check_unicode(str(value), name, number)


def add_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def check_unicode(text: str, name: str, number: int) -> str:
    """Returns the text if it can be encoded as UTF-8.

    Raises:
        ConfigError: it holds half of a surrogate pair, such as "\\ud83d" alone in JSON.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"dataset: row {number + 1} has half a character in column {name!r}: "
            f'{text[error.start]!r}. Both halves of a pair are needed, "\\ud83d\\ude00".'
        ) from error
    return text


def parse_messages(value: Any, name: str, number: int) -> tuple[Mapping[str, str], ...]:
    """Parses a chat, [{role: ..., content: ...}]; returns () if the cell is not a list.

    Raises:
        ConfigError: an item is not a message, or the last message is missing, blank or the
            assistant's, so there is nothing to answer.
    """
    if not isinstance(value, list):
        return ()
    for message in value:
        texts = (
            [message.get(key) for key in ("role", "content")]
            if isinstance(message, dict)
            else [None]
        )
        if not all(isinstance(text, str) for text in texts):
            raise ConfigError(
                f"dataset: row {number + 1} has a list in column {name!r} whose items are not all "
                f"messages: {{role: ..., content: ...}}."
            )
        check_unicode(message["content"], name, number)
    if not value or value[-1]["role"] == "assistant" or not value[-1]["content"].strip():
        raise ConfigError(
            f"dataset: row {number + 1}: the chat in column {name!r} leaves nothing to answer."
        )
    return tuple(value)
