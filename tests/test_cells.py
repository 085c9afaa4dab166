"""Cells of a table that are valid questions or answers, and cells that are refused."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from grpo.data import GSM8K, Jsonl
from grpo.data.files import read_rows
from grpo.data.hub_rows import read_hub
from grpo.errors import ConfigError

NOTHING = "nothing in column"


def make_example(question: Any = "How many?", answer: Any = "5") -> Any:
    """Makes an example of the second row of a table."""
    return Jsonl("x.jsonl").example({"question": question, "answer": answer}, 1)


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (" 5 ", "5"),
        (5, "5"),
        (-0.25, "-0.25"),
        (7.0, "7.0"),  # pandas writes this if a column of whole numbers has gaps
        (Decimal("1.50"), "1.50"),
        (True, "True"),  # case doesn't matter in an answer
        ("nan", "nan"),  # text may be a valid answer
    ],
)
def test_texts_and_numbers_are_gold_answers(cell: Any, text: str) -> None:
    example = make_example(answer=cell)
    assert example.answer == text
    assert example.verify(f"<answer>{cell}</answer>") == 1.0


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        *((nothing, NOTHING) for nothing in (None, "", " \n", float("nan"), Decimal("nan"))),
        (Decimal("sNaN"), NOTHING),
        (["5"], "a list in column 'answer': \\['5'\\]"),
        ([], "a list"),
        ({"ground_truth": "5"}, "a dict in column 'answer': {'ground_truth': '5'}"),
        (b"5", "a bytes"),
        (float("inf"), "an inf"),
        (Decimal("-Infinity"), "a -Infinity"),
        (datetime.date(2025, 3, 9), "a date"),  # which can be written in a dozen ways
        (pandas.Timestamp("2025-03-09"), "a Timestamp"),
        (datetime.timedelta(1), "a timedelta"),
        ("caf\ud83d", "half a character in column 'answer'"),
    ],
)
def test_what_no_answer_can_equal_is_refused_with_its_row(cell: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=f"row 2 has {says}"):
        make_example(answer=cell)
    with pytest.raises(ConfigError, match="row 2 has"):
        GSM8K("x.jsonl").example({"question": "How many?", "answer": cell}, 1)


def test_where_numbers_are_read_the_answer_has_to_be_one() -> None:
    source = Jsonl("x.jsonl", extract="number")
    row = {"question": "How many?", "answer": "1 000 €"}
    assert source.example(row, 0).verify("That makes 1,000 euros.") == 1.0
    with pytest.raises(ConfigError, match="row 3 has '5 apples' in column 'answer', which is no"):
        source.example({"question": "How many?", "answer": "5 apples"}, 2)


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        (float("nan"), NOTHING),
        ({"text": "How many?"}, "a dict in column 'question'"),
        (b"How many?", "row 2 has a bytes"),
        ("How\udc00 many?", "half a character"),
        ([{"role": "user", "content": "How\udc00 many?"}], "half a character"),
        ([{"role": "user", "content": " "}], "leaves nothing to answer"),
        ([{"from": "human", "value": "How many?"}], "are not all messages"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_its_row(cell: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_example(question=cell)


def test_short_floats_of_parquet_and_of_the_hub_are_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.1 as a float32 is 0.10000000149011612 as a float64; a missing value stays missing."""
    table = pyarrow.table(
        {
            "answer": pyarrow.array([0.1, None, 2.5], pyarrow.float32()),
            "half": pyarrow.array(numpy.float16([0.1, 0.2, 0.3])),
            "double": pyarrow.array([0.1, 0.2, 0.3], pyarrow.float64()),
            "question": ["a", "b", "c"],
        }
    )
    (tmp_path / "rows").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "rows/train.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    hub, commit = read_hub(str(tmp_path / "rows"), "default", "train")
    assert commit is None  # a folder has none
    for rows in (read_rows(tmp_path / "rows/train.parquet"), hub):
        assert [row["answer"] for row in rows] == [0.1, None, 2.5]
        assert [row["half"] for row in rows] == [0.1, 0.2, 0.3]
        assert [row["double"] for row in rows] == [0.1, 0.2, 0.3]


def test_a_file_with_a_mark_of_utf_8_is_read(tmp_path: Path) -> None:
    """Windows programs write the byte-order mark before the first row."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "q", "answer": "1"}) + "\r\n", encoding="utf-8-sig")
    assert read_rows(file) == [{"question": "q", "answer": "1"}]


@pytest.mark.parametrize("line", ["[" * 10**5, '{"a": ' + "1" * 5000 + "}"], ids=["deep", "long"])
def test_json_that_python_gives_up_on_is_refused_with_its_line(line: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n' + line)
    with pytest.raises(ConfigError, match="line 2"):
        read_rows(file)


def test_a_broken_parquet_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"answer": list(range(10**4))}), file)
    whole = file.read_bytes()
    for broken in (b"", whole[:-50], b"PAR1" + bytes(2000) + whole[2004:]):
        file.write_bytes(broken)
        with pytest.raises(ConfigError, match="not a parquet file"):
            read_rows(file)
