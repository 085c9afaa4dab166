"""Lazy sequences of rows and examples: each item is made when it is accessed.

A data set of up to MAX_EAGER_ROWS rows is read as a whole, which is simpler. A million rows would
take minutes and gigabytes, so of a larger data set only what is needed to find a row is kept.
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, overload

from grpo.data.cells import FloatShortener, Row
from grpo.data.file_errors import file_error, json_error
from grpo.types import Example

if TYPE_CHECKING:
    import pyarrow

MAX_EAGER_ROWS = 16_384  # rows
ROWS_PER_CHUNK = 4096  # rows of a table that are converted to Python objects at a time


class Rows(Sequence[Any]):
    """A sequence with access to one item, or to a range of items in order."""

    def get_item(self, number: int) -> Any:
        raise NotImplementedError

    def iterate_range(self, numbers: range) -> Iterator[Any]:
        """Iterates over a range of items; faster than one by one if they are stored together."""
        return (self.get_item(number) for number in numbers)

    @overload
    def __getitem__(self, number: int) -> Any: ...
    @overload
    def __getitem__(self, number: slice) -> list[Any]: ...
    def __getitem__(self, number: int | slice) -> Any:
        if isinstance(number, slice):
            return [self.get_item(n) for n in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        return self.get_item(number % len(self))

    def __iter__(self) -> Iterator[Any]:
        return self.iterate_range(range(len(self)))


class GeneratedRows(Rows):
    """Rows that are generated from their numbers, so they are always valid."""

    def __init__(self, size: int, make: Callable[[int], Any]) -> None:
        self.size, self.make = size, make

    def __len__(self) -> int:
        return self.size

    def get_item(self, number: int) -> Any:
        return self.make(number)


class JsonlRows(Rows):
    """The lines of a .jsonl file, found by their byte offsets; blank lines are skipped."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.starts, self.lines = array("q"), array("q")
        start = 0
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.isspace():
                    self.starts.append(start)
                    self.lines.append(number)
                start += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def get_item(self, number: int) -> Row:
        with self.file.open("rb") as stream:
            return next(self._read(stream, range(number, number + 1)))

    def iterate_range(self, numbers: range) -> Iterator[Row]:
        with self.file.open("rb") as stream:
            yield from self._read(stream, numbers)

    def _read(self, stream: BinaryIO, numbers: range) -> Iterator[Row]:
        following = -1
        for number in numbers:
            if self.lines[number] != following:
                stream.seek(self.starts[number])
            following = self.lines[number] + 1
            yield parse_line(stream.readline(), self.lines[number], self.file)


def parse_line(line: bytes, number: int, file: Path) -> Row:
    """Parses line `number` (from 1) of a .jsonl file.

    Raises:
        ConfigError: it is not UTF-8, not JSON, or not an object.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # thousands of digits, or of nested brackets
        raise json_error(error, file, number) from error
    if not isinstance(row, dict):
        raise file_error(file, f"line {number} is not a JSON object.")
    return row


class TableRows(Rows):
    """The rows of an Arrow table, which takes no more memory than its texts."""

    def __init__(self, table: pyarrow.Table, floats: FloatShortener) -> None:
        self.table, self.floats = table, floats

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def get_item(self, number: int) -> Row:
        return self.floats.shorten(self.table.slice(number, 1).to_pylist()[0])

    def iterate_range(self, numbers: range) -> Iterator[Row]:
        for start in range(numbers.start, numbers.stop, ROWS_PER_CHUNK):
            part = self.table.slice(start, min(ROWS_PER_CHUNK, numbers.stop - start))
            yield from map(self.floats.shorten, part.to_pylist())


class JoinedRows(Rows):
    """The rows of several files, one file after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = parts
        self.ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def get_item(self, number: int) -> Row:
        part = bisect_right(self.ends, number)
        row: Row = self.parts[part][number - self.ends[part]]  # negative: counted from the end
        return row

    def iterate_range(self, numbers: range) -> Iterator[Row]:
        for part, end in zip(self.parts, self.ends, strict=True):
            begin = end - len(part)
            start, stop = max(numbers.start, begin), min(numbers.stop, end)
            if start < stop:
                yield from part.iterate_range(range(start - begin, stop - begin))


class HubRows(Rows):
    """The rows of a split loaded by the datasets library, which stay on the disk."""

    def __init__(self, split: Any, floats: FloatShortener) -> None:
        self.split, self.floats = split, floats

    def __len__(self) -> int:
        return len(self.split)

    def get_item(self, number: int) -> Row:
        return self.floats.shorten(self.split[number])

    def iterate_range(self, numbers: range) -> Iterator[Row]:
        for start in range(numbers.start, numbers.stop, ROWS_PER_CHUNK):
            columns = self.split[start : min(start + ROWS_PER_CHUNK, numbers.stop)]
            for values in zip(*columns.values(), strict=True):
                yield self.floats.shorten(dict(zip(columns, values, strict=True)))


class Examples(Rows):
    """The rows of a slice as examples.

    The constructor makes each example once, so that an invalid row is reported before the run
    starts, and keeps only a hash of its question, to find evaluation rows. It skips generated rows.
    """

    def __init__(
        self, rows: Sequence[Any], numbers: range, example: Callable[[Any, int], Example]
    ) -> None:
        self.rows, self.example = rows, example
        self.numbers: Sequence[int] = numbers
        self.hashes: array[int] | None = None
        if not isinstance(rows, GeneratedRows):
            selected = (
                rows.iterate_range(numbers)
                if isinstance(rows, Rows)
                else map(rows.__getitem__, numbers)
            )
            examples = map(example, selected, numbers)
            self.hashes = array("q", (hash(each.question) for each in examples))

    def __len__(self) -> int:
        return len(self.numbers)

    def get_item(self, number: int) -> Example:
        row = self.numbers[number]
        return self.example(self.rows[row], row)

    def iterate_range(self, numbers: range) -> Iterator[Example]:
        row_numbers = self.numbers[numbers.start : numbers.stop]
        if isinstance(self.rows, Rows) and isinstance(row_numbers, range):
            return map(self.example, self.rows.iterate_range(row_numbers), row_numbers)
        return (self.example(self.rows[row], row) for row in row_numbers)

    def drop_questions(self, questions: set[str]) -> Examples:
        """Returns the examples without those that ask one of these questions.

        Generated examples are all kept: their questions are not known before they are drawn.
        """
        if self.hashes is None:
            return self
        hashes = {hash(question) for question in questions}
        likely = [number for number, hashed in enumerate(self.hashes) if hashed in hashes]
        dropped = {number for number in likely if self.get_item(number).question in questions}
        if not dropped:
            return self
        remaining = copy(self)
        kept = [n for n in range(len(self)) if n not in dropped]
        remaining.numbers = array("q", (self.numbers[n] for n in kept))
        remaining.hashes = array("q", (self.hashes[n] for n in kept))
        return remaining
