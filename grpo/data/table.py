"""Data sets that are tables: files on disk, or on the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.data.slices import parse_slice
from grpo.data.source import Source
from grpo.data.verify import AnswerVerifier
from grpo.errors import ConfigError
from grpo.types import Example

Row = Mapping[str, Any]


class Jsonl(Source):
    """Rows of a .jsonl or .parquet file: one column asks, another holds the answer."""

    def __init__(
        self,
        path: str | None,
        slice: str,
        eval_slice: str,
        eval_path: str | None = None,
        question_column: str = "question",
        answer_column: str = "answer",
        extract: str = "tag",
    ) -> None:
        if path is None:
            raise ConfigError("dataset.path is not set: name a .jsonl or .parquet file.")
        self.path, self.slice = path, slice
        self.eval_path, self.eval_slice = eval_path or path, eval_slice
        self.question_column, self.answer_column = question_column, answer_column
        self.verifier = AnswerVerifier(extract)

    def train(self) -> list[Example]:
        return self._examples(read_file("dataset.path", self.path), self.slice, "dataset.slice")

    def evaluation(self) -> list[Example]:
        rows = read_file("dataset.eval_path", self.eval_path)
        return self._examples(rows, self.eval_slice, "dataset.eval_slice")

    def _examples(self, rows: Sequence[Row], slice: str, key: str) -> list[Example]:
        return [self._example(rows[i], i) for i in parse_slice(slice, len(rows), key)]

    def _example(self, row: Row, number: int) -> Example:
        question = column(row, "question_column", self.question_column, number)
        gold = self.gold_answer(column(row, "answer_column", self.answer_column, number), number)
        return Example(question, gold, self.verifier.bind(gold), row)

    def gold_answer(self, text: str, number: int) -> str:
        """What stands in the answer column, as an answer to compare with."""
        return text.strip()


class GSM8K(Jsonl):
    """Grade-school word problems (2110.14168); the gold answer is the number behind `####`."""

    def __init__(
        self,
        path: str | None,
        split: str,
        slice: str,
        eval_split: str,
        eval_slice: str,
        extract: str = "tag",
        id: str = "openai/gsm8k",
        subset: str = "main",
    ) -> None:
        """path: a .jsonl or .parquet, or a folder with one for each split; None asks the hub."""
        file, eval_file = split_file(path, split), split_file(path, eval_split)
        super().__init__(file or "hub", slice, eval_slice, eval_file, extract=extract)
        self.on_hub = path is None
        self.id, self.subset, self.split, self.eval_split = id, subset, split, eval_split

    def train(self) -> list[Example]:
        if not self.on_hub:
            return super().train()
        rows = read_hub(self.id, self.subset, self.split)
        return self._examples(rows, self.slice, "dataset.slice")

    def evaluation(self) -> list[Example]:
        if not self.on_hub:
            return super().evaluation()
        rows = read_hub(self.id, self.subset, self.eval_split)
        return self._examples(rows, self.eval_slice, "dataset.eval_slice")

    def gold_answer(self, text: str, number: int) -> str:
        _, mark, gold = text.rpartition("####")
        if not mark:
            raise ConfigError(
                f"dataset: row {number + 1} has no '####' before its answer: {text[-60:]!r}. "
                f"Use dataset=jsonl for answers written as they are."
            )
        return gold.replace(",", "").replace("$", "").strip()


def split_file(path: str | None, split: str) -> str | None:
    """The file of a split: the one named by it in a folder, or the one file itself."""
    if path is None or not Path(path).expanduser().is_dir():
        return path
    for suffix in (".jsonl", ".parquet"):
        file = Path(path).expanduser() / f"{split}{suffix}"
        if file.is_file():
            return str(file)
    raise ConfigError(f"dataset.path={path}: holds no {split}.jsonl or {split}.parquet.")


def read_file(key: str, path: str) -> Sequence[Row]:
    """All rows of a file.

    Raises:
        ConfigError: naming `key`, and the line where a .jsonl is not JSON.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"{key}={path}: there is no such file.")
    readers = {".jsonl": read_jsonl, ".parquet": read_parquet}
    if file.suffix not in readers:
        raise ConfigError(f"{key}={path}: use a .jsonl or .parquet file.")
    rows = readers[file.suffix](key, file)
    if not rows:
        raise ConfigError(f"{key}={path}: the file has no rows.")
    return rows


def read_jsonl(key: str, file: Path) -> Sequence[Row]:
    rows = []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}={file}: not UTF-8 text ({error.reason}).") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{key}={file}: line {number} is not JSON ({error.msg}).") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{key}={file}: line {number} is not a JSON object.")
        rows.append(row)
    return rows


def read_parquet(key: str, file: Path) -> Sequence[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_table(file).to_pylist())
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"{key}={file}: not a parquet file ({error}).") from error


def read_hub(id: str, subset: str, split: str) -> Sequence[Row]:
    """A split of a hub data set, from the local cache where the hub can't be reached."""
    import datasets

    from grpo.hub import HubUnreachable, require_hub

    try:
        require_hub()
    except HubUnreachable as error:
        datasets.config.HF_HUB_OFFLINE = True  # straight to the cache
        unreachable: HubUnreachable | None = error
    else:
        unreachable = None
    try:
        return list(datasets.load_dataset(id, subset, split=split))
    except (ConnectionError, OSError) as error:
        raise ConfigError(
            f"dataset: {id} is not in the local cache and {unreachable or error}. Use "
            f"dataset.path= with a local .jsonl or .parquet, or dataset=arithmetic, which is "
            f"generated."
        ) from error
    except ValueError as error:
        raise ConfigError(f"dataset.split={split}: {error}") from error


def column(row: Row, key: str, name: str, number: int) -> str:
    if name not in row:
        raise ConfigError(
            f"dataset.{key}={name}: row {number + 1} has no such column; it has {', '.join(row)}."
        )
    value = row[name]
    if value is None or not str(value).strip():
        raise ConfigError(f"dataset: row {number + 1} has nothing in column {name!r}.")
    return str(value)
