"""What a cell of a table holds, as a text that can be asked or compared; refused where it isn't."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from grpo.errors import ConfigError

Row = Mapping[str, Any]
# By the name that Arrow gives it, or a feature of datasets.
NARROW_DTYPES = {
    "float": "float32",
    "halffloat": "float16",
    "float32": "float32",
    "float16": "float16",
}


class FloatShortener:
    """Rows of a table in which a float32's 0.1 is 0.1, not 0.10000000149011612."""

    def __init__(self, types: Mapping[str, str]) -> None:
        """types: of the columns, by Arrow or datasets."""
        import numpy

        self.dtypes = {
            name: getattr(numpy, NARROW_DTYPES[kind])
            for name, kind in types.items()
            if kind in NARROW_DTYPES
        }

    def shorten(self, row: Row) -> Row:
        found = {name: row[name] for name in self.dtypes if row[name] is not None}
        short = {name: float(str(self.dtypes[name](value))) for name, value in found.items()}
        return {**row, **short} if short else row


def read_cell(row: Row, key: str, name: str, number: int) -> Any:
    """What row `number` (from 0) has in the column that `dataset.{key}` names.

    Raises:
        ConfigError: there is no such column, or nothing in it.
    """
    if name not in row:
        raise ConfigError(
            f"dataset.{key}={name}: row {number + 1} has no such column; it has {', '.join(row)}."
        )
    value = row[name]
    # A missing value is NaN to pandas, which writes it as such into JSON and parquet.
    if value is None or is_nan(value) or (isinstance(value, str) and not value.strip()):
        raise ConfigError(f"dataset: row {number + 1} has nothing in column {name!r}.")
    return value


def is_nan(value: Any) -> bool:
    if isinstance(value, Decimal):
        return value.is_nan()
    return isinstance(value, float) and math.isnan(value)


def convert_to_text(value: Any, name: str, number: int) -> str:
    """A cell as text: a text as it is, a number in its shortest form, true and false.

    Raises:
        ConfigError: it is something that nobody writes, so that no answer could equal it.
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
    """A text that can be written and read again.

    Raises:
        ConfigError: it has half a character, as JSON's "\\ud83d" alone is.
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
    """A column that holds a chat, [{role: ..., content: ...}]; empty where it holds none.

    Raises:
        ConfigError: it is a list of something else, or nothing in it is to be answered.
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
