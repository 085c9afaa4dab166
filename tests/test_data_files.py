"""Local tables of every kind: one file, one file per split, several shards per split."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.data import GSM8K, Jsonl
from grpo.data.files import READERS, read_path, read_rows
from grpo.data.json_rows import find_rows
from grpo.data.rows import JoinedRows, Rows
from grpo.data.source import Slices
from grpo.errors import ConfigError

ROWS = [
    {"question": "How much is 1, 2 and 3?", "answer": "6"},
    {"question": 'Two lines,\nand "quotes"', "answer": "042"},
    {"question": "naïve ünïcode \u2028 \t tab", "answer": "#### 1,234"},
]


def write_table(file: Path, rows: list[dict[str, str]]) -> Path:
    """Writes a table in the format of the file's suffix."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with file.open("w", encoding="utf-8", newline="") as stream:
            dialect = "excel-tab" if file.suffix == ".tsv" else "excel"
            writer = csv.DictWriter(stream, rows[0], dialect=dialect)
            writer.writeheader()
            writer.writerows(rows)
    return file


@pytest.mark.parametrize("suffix", READERS)
def test_every_kind_of_file_reads_the_same(suffix: str, tmp_path: Path) -> None:
    file = write_table(tmp_path / f"rows{suffix}", ROWS)
    assert read_rows(file) == ROWS
    examples = Slices("train", ":2", "test", "2:").read_training_examples(Jsonl(str(file)))
    assert [example.answer for example in examples] == ["6", "042"]
    (last,) = Slices("train", ":2", "test", "2:").read_evaluation_examples(GSM8K(str(file)))
    assert last.answer == "1234"


@pytest.mark.parametrize("suffix", READERS)
def test_every_kind_stays_lean_where_there_are_many_rows(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are read lazily from one file and from shards, by any index or range."""
    rows = [{"question": f"{n}?", "answer": str(n)} for n in range(100)]
    write_table(tmp_path / f"one{suffix}", rows)
    for number, (start, stop) in enumerate(((0, 40), (40, 41), (41, 100))):
        write_table(tmp_path / f"many/train-{number:05}-of-00003{suffix}", rows[start:stop])
    monkeypatch.setattr("grpo.data.files.MAX_EAGER_ROWS", 12)
    one, many = read_rows(tmp_path / f"one{suffix}"), read_path(str(tmp_path / "many"), "train")
    assert isinstance(many, JoinedRows)
    for lean in (one, many):
        assert isinstance(lean, Rows)
        assert len(lean) == 100
        assert [lean[n] for n in (99, 0, 40, 41, -1, 39)] == [
            rows[n] for n in (99, 0, 40, 41, 99, 39)
        ]
        assert list(lean) == rows
        assert list(lean.iterate_range(range(35, 50))) == rows[35:50]


def test_the_mark_that_windows_puts_first_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b"\xef\xbb\xbfquestion,answer\r\n\r\n1+1?,2\r\n")
    assert read_rows(file) == [{"question": "1+1?", "answer": "2"}]
    (tmp_path / "rows.json").write_bytes(b'\xef\xbb\xbf[{"a": 1}]')
    assert read_rows(tmp_path / "rows.json") == [{"a": 1}]


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    """The cell is longer than csv's own limit, which is restored afterwards."""
    rows = [{"question": "x" * 200_000, "answer": "1"}]
    before = csv.field_size_limit()
    assert read_rows(write_table(tmp_path / "rows.csv", rows)) == rows
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"question,answer\n1,2\n3\n", "line 3 has 1 cells, where the first line names 2 columns"),
        (b'question,answer\n"1\n1",2\n3,4,5\n', "line 4 has 3 cells"),
        (b'question,answer\n1,"2\n3,4\n', "line 3: unexpected end of data"),
        (b'question,answer\n"1"x,2\n', "line 2: ',' expected after"),
        (b"question,question\n1,2\n", "its first line names 'question' twice"),
        (b"question,answer\n1,2\n\xe9,3\n", "line 3 is not UTF-8"),
        (b"question,answer\n", "no rows"),
        (b"", "no rows"),
    ],
)
def test_a_bad_csv_is_refused_with_its_line(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        read_rows(file)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('{"data": [{"a": 1}, {"a": 2}], "version": "1", "tags": ["x"]}', [{"a": 1}, {"a": 2}]),
        (' {"meta": {"n": [1]}, "rows": [{"a": [{"b": 1}]}]} \n', [{"a": [{"b": 1}]}]),
        ('{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),  # one object per line
        ('{"a": [{"b": 1}]}\n\n{"a": []}', [{"a": [{"b": 1}]}, {"a": []}]),
    ],
)
def test_rows_are_found_in_a_json_file(text: str, rows: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(text)
    assert read_rows(file) == rows


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'[{"a": 1},\n {"a": }]', "line 2 is not JSON"),
        (b'[{"a": 1}\n {"a": 2}]', "line 2 is not JSON"),
        (b'[{"a": 1},\n]', "line 2 is not JSON"),
        (b'[{"a": 1}]\n[]', "line 2 is not JSON"),
        (b'[{"a": 1}', "line 1 is not JSON"),
        (b'{"a": [{"a": 1}]', "line 1 is not JSON"),
        (b'{"a" 1}', "line 1 is not JSON"),
        (b"{1: 2}", "line 1 is not JSON"),
        (b'{"a": 1}\n{"a"\n', "line 2 is not JSON"),
        (b'[\n{"a": "\xe9"}]', "line 2 is not UTF-8"),
        (b"[1, 2]", "items of its list must all be objects"),
        (b"3", "should hold a list of objects"),
        (b"x", "line 1 is not JSON"),
        (b'{"a": [1]}', "should hold one list of objects, but has none"),
        (b'{"a": [{}], "b": [{}]}', "should hold one list of objects, but has a and b"),
        (b"[]", "no rows"),
        (b" \n", "no rows"),
        (b"[" * 10**5, "recursion|Recursion"),
        (b"[" + b"1" * 5000 + b"]", "digits"),
    ],
)
def test_a_bad_json_file_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        list(read_rows(file))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(
    st.lists(st.dictionaries(st.text(), JSON), min_size=1),
    st.sampled_from([None, 0, 3, "\t"]),
    st.booleans(),
)
def test_the_rows_of_a_list_are_those_that_json_reads(
    rows: list[dict[str, Any]], indent: int | str | None, inside: bool
) -> None:
    text = json.dumps({"x": "]", "rows": rows} if inside else rows, indent=indent)
    assert list(find_rows(text, Path("x.json"))) == rows


def write_tables(folder: Path, *names: str) -> str:
    """Writes files of one row each, whose answer is the file's name."""
    for name in names:
        write_table(folder / name, [{"question": "q", "answer": name}])
    return str(folder)


@pytest.mark.parametrize(
    ("names", "split", "found"),
    [
        (["train.csv", "test.csv"], "test", ["test.csv"]),
        (["data/test.tsv", "data/train.tsv"], "train", ["data/train.tsv"]),
        (["test/b.json", "test/a.json", "train/a.json"], "test", ["test/a.json", "test/b.json"]),
        (
            ["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet"],
            "train",
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ),
        (
            ["train-00000-of-00001-0123456789abcdef.parquet", "test-00000-of-00001.parquet"],
            "train",
            ["train-00000-of-00001-0123456789abcdef.parquet"],
        ),
        (["math-500.jsonl", "math.jsonl"], "math-500", ["math-500.jsonl"]),
        (["test.csv", "test.jsonl", "test.parquet"], "test", ["test.jsonl"]),
        (["test.csv", "data/test.jsonl"], "test", ["test.csv"]),
        (["test.parquet", "test-00000-of-00001.parquet"], "test", ["test.parquet"]),
    ],
)
def test_a_folder_holds_a_split_as_one_file_or_as_shards(
    names: list[str], split: str, found: list[str], tmp_path: Path
) -> None:
    rows = read_path(write_tables(tmp_path, *names), split)
    assert [row["answer"] for row in rows] == found


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["train.csv", "data/dev-00000-of-00001.csv"], "holds no split test, .*has dev, train"),
        (["test-00000-of-00003.csv", "test-00002-of-00003.csv"], "number 1 is missing"),
        (["test-00000-of-00001.csv", "test-00001-of-00002.csv"], "of 1 and of 2"),
        ([], "holds no .jsonl, .json, .csv, .tsv or .parquet file"),
    ],
)
def test_a_split_that_is_not_there_or_not_whole_is_refused(
    names: list[str], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        read_path(write_tables(tmp_path, *names), "test")


def test_shards_may_differ_but_every_row_has_the_columns(tmp_path: Path) -> None:
    write_table(tmp_path / "test-00000-of-00002.csv", ROWS)
    write_table(tmp_path / "test-00001-of-00002.csv", [{"question": "q", "gold": "1"}])
    with pytest.raises(ConfigError, match=r"row 4 has no such column; it has question, gold\."):
        Slices("test", ":", "test", ":").read_evaluation_examples(Jsonl(str(tmp_path)))


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_a_run_trains_on_it(
    suffix: str, grpo: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    rows = [{"ask": f"What is {n} + 1?", "gold": str(n + 1)} for n in range(20)]
    write_table(tmp_path / f"mine{suffix}", rows)
    code, printed = grpo(
        "experiment=smoke", "tracking=none", "max_steps=1", "dataset=jsonl", "hydra.run.dir=run",
        f"dataset.path=mine{suffix}", "dataset.question_column=ask", "dataset.answer_column=gold",
    )  # fmt: skip
    assert code == 0, printed
