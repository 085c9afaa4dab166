"""The rows of a .json file: a list of objects, an object with one such list, or JSON lines."""

from __future__ import annotations

import json
import re
from array import array
from pathlib import Path

from grpo.data.cells import Row
from grpo.data.file_errors import file_error, json_error
from grpo.data.rows import JsonlRows, Rows

BLANKS = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder()


def read_json(file: Path) -> Rows:
    """Reads the objects of the one list in a file, or of a file with one object per line.

    Raises:
        ConfigError: the file is not JSON (the message names the line) or holds no rows.
    """
    try:
        return find_rows(file.read_bytes().decode("utf-8-sig"), file)
    except (ValueError, RecursionError) as error:  # thousands of digits, or of nested brackets
        raise json_error(error, file) from error


def find_rows(text: str, file: Path) -> Rows:
    start = skip_blanks(text, 0)
    if start == len(text):
        raise file_error(file, "the file has no rows.")
    if text[start] == "[":
        found, end = find_objects(text, start)
        check_end(text, end)
        if found is None:
            raise file_error(file, "the items of its list must all be objects.")
        return JsonRows(text, found)
    if text[start] != "{":
        DECODER.raw_decode(text, start)  # raises with the position if it is not JSON
        raise file_error(file, "should hold a list of objects.")
    lists, end = find_lists(text, start)
    if skip_blanks(text, end) != len(text):
        return JsonlRows(file)  # one object per line, although the file is named .json
    if len(lists) != 1:
        raise file_error(
            file, f"should hold one list of objects, but has {' and '.join(lists) or 'none'}."
        )
    return JsonRows(text, next(iter(lists.values())))


class JsonRows(Rows):
    """The objects of a list, found by their positions in the text and parsed when accessed.

    Only the text stays in memory; the parsed objects would take ten times as much.
    """

    def __init__(self, text: str, starts: array[int]) -> None:
        self.text, self.starts = text, starts

    def __len__(self) -> int:
        return len(self.starts)

    def get_item(self, number: int) -> Row:
        row: Row = DECODER.raw_decode(self.text, self.starts[number])[0]
        return row


def find_lists(text: str, start: int) -> tuple[dict[str, array[int]], int]:
    """Returns where the items begin in each list of objects in an object, and where it ends."""
    lists: dict[str, array[int]] = {}
    at = skip_blanks(text, start + 1)
    while text[at : at + 1] != "}":
        if text[at : at + 1] != '"':
            raise json.JSONDecodeError("Expecting property name", text, at)
        name, at = DECODER.raw_decode(text, at)
        at = skip_blanks(text, expect(":", text, at))
        found = None
        if text[at : at + 1] == "[":
            found, at = find_objects(text, at)
        else:
            _, at = DECODER.raw_decode(text, at)
        if found:
            lists[name] = found
        at = find_next_item(text, at, "}")
    return lists, at + 1


def find_objects(text: str, start: int) -> tuple[array[int] | None, int]:
    """Returns where the objects of a list begin (None if not all are objects) and where it ends."""
    starts, only_objects = array("q"), True
    at = skip_blanks(text, start + 1)
    while text[at : at + 1] != "]":
        only_objects = only_objects and text[at : at + 1] == "{"
        starts.append(at)
        _, at = DECODER.raw_decode(text, at)
        at = find_next_item(text, at, "]")
    return starts if only_objects else None, at + 1


def find_next_item(text: str, at: int, end: str) -> int:
    """Returns the position of the next item, or of `end` if the last item is before `at`."""
    at = skip_blanks(text, at)
    if text[at : at + 1] == end:
        return at
    at = skip_blanks(text, expect(",", text, at))
    if text[at : at + 1] == end:
        raise json.JSONDecodeError("Illegal trailing comma", text, at)
    return at


def expect(sign: str, text: str, at: int) -> int:
    at = skip_blanks(text, at)
    if text[at : at + 1] != sign:
        raise json.JSONDecodeError(f"Expecting {sign!r}", text, at)
    return at + 1


def check_end(text: str, at: int) -> None:
    at = skip_blanks(text, at)
    if at != len(text):
        raise json.JSONDecodeError("Extra data", text, at)


def skip_blanks(text: str, at: int) -> int:
    blanks = BLANKS.match(text, at)
    assert blanks is not None  # the pattern also matches the empty string
    return blanks.end()
