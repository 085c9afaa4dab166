"""Comma- and tab-separated values (RFC 4180): the first line names the columns, cells are text."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grpo.data.cells import FloatShortener
from grpo.data.file_errors import file_error
from grpo.data.rows import ROWS_PER_CHUNK, TableRows

if TYPE_CHECKING:
    from _csv import Reader

    import pyarrow

DELIMITERS = {".csv": ",", ".tsv": "\t"}
MAX_CELL_CHARS = 2**31 - 1  # characters of a cell; csv's own limit is 131,072


def read_csv(file: Path) -> TableRows:
    """Reads a file into an Arrow table of text columns.

    Raises:
        ConfigError: a line has too few or too many cells, or can't be read; the message names it.
    """
    import pyarrow

    limit = csv.field_size_limit(MAX_CELL_CHARS)
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter=DELIMITERS[file.suffix.lower()], strict=True)
            names = next((row for row in reader if row), [])
            check_names(names, file)
            schema = pyarrow.schema([(name, pyarrow.string()) for name in names])
            batches = list(make_batches(read_records(reader, names, file), schema))
    except csv.Error as error:
        raise file_error(file, f"line {reader.line_num}: {error}.") from error
    except UnicodeDecodeError as error:
        number = find_undecodable_line(file)
        raise file_error(file, f"line {number} is not UTF-8 text ({error.reason}).") from error
    finally:
        csv.field_size_limit(limit)
    return TableRows(pyarrow.Table.from_batches(batches, schema), FloatShortener({}))


def check_names(names: Sequence[str], file: Path) -> None:
    for name in names:
        if names.count(name) > 1:
            raise file_error(file, f"its first line names {name!r} twice.")


def read_records(reader: Reader, names: Sequence[str], file: Path) -> Iterator[list[str]]:
    """Yields the rows, skipping blank lines; raises ConfigError if a row lacks or exceeds cells."""
    for row in reader:
        if len(row) == len(names):
            yield row
        elif row:
            raise file_error(
                file,
                f"line {reader.line_num} has {len(row)} cells, where the "
                f"first line names {len(names)} columns: {', '.join(names)}.",
            )


def make_batches(
    rows: Iterator[list[str]], schema: pyarrow.Schema
) -> Iterator[pyarrow.RecordBatch]:
    """Converts rows to Arrow in batches, so that few are in memory as Python objects at once."""
    batch: list[list[str]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == ROWS_PER_CHUNK:
            yield make_batch(batch, schema)
            batch = []
    if batch:
        yield make_batch(batch, schema)


def make_batch(rows: Sequence[Sequence[str]], schema: pyarrow.Schema) -> pyarrow.RecordBatch:
    import pyarrow

    columns = [pyarrow.array(cells, pyarrow.string()) for cells in zip(*rows, strict=True)]
    return pyarrow.RecordBatch.from_arrays(columns, schema=schema)


def find_undecodable_line(file: Path) -> int:
    """Returns the number (from 1) of the first line that is not UTF-8."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1
