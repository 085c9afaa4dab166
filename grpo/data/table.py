"""Data sets that are tables: files on disk, or on the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from grpo.config.validation import check_revision
from grpo.data.answers import answered, choose_extractor
from grpo.data.cells import Row, convert_to_text, parse_messages, read_cell
from grpo.data.files import FILE_KINDS, read_path
from grpo.data.hub_rows import read_hub
from grpo.data.source import Source
from grpo.errors import ConfigError
from grpo.types import Example
from grpo.verifiers.numbers import parse_number

DATASET_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Table(Source):
    """Rows with columns: one holds the question, another the answer."""

    def __init__(self, question_column: str, answer_column: str, extract: str) -> None:
        self.question_column, self.answer_column = question_column, answer_column
        choose_extractor(extract)
        self.extract = extract

    def example(self, row: Row, number: int) -> Example:
        column = self.question_column
        cell = read_cell(row, "question_column", column, number)
        messages = parse_messages(cell, column, number)
        if messages:
            question = "\n\n".join(message["content"] for message in messages)
        else:
            question = convert_to_text(cell, column, number)
        column = self.answer_column
        cell = read_cell(row, "answer_column", column, number)
        gold = self.parse_gold_answer(convert_to_text(cell, column, number), number)
        if self.extract == "number" and parse_number(gold) is None:
            raise ConfigError(
                f"dataset: row {number + 1} has {gold[:60]!r} in column {column!r}, which is not "
                f"a number, but dataset.extract=number reads only numbers."
            )
        return answered(question, gold, self.extract, row, messages)

    def parse_gold_answer(self, text: str, number: int) -> str:
        """Returns the gold answer from the text of the answer column."""
        return text.strip()


class Jsonl(Table):
    """A table in a file, or in a folder with a file or several shards for each split."""

    def __init__(
        self,
        path: str | None,
        question_column: str = "question",
        answer_column: str = "answer",
        extract: str = "tag",
    ) -> None:
        """path: one file, used for every split, or a folder whose files are named after splits."""
        super().__init__(question_column, answer_column, extract)
        self.path = path

    def rows(self, split: str) -> Sequence[Row]:
        if self.path is None:
            raise ConfigError(f"dataset.path is not set: name a {FILE_KINDS} file.")
        return read_path(self.path, split)


class Hub(Table):
    """A table on the hub."""

    def __init__(
        self,
        id: str | None,
        subset: str | int | None = None,
        revision: str | int | None = None,
        question_column: str = "question",
        answer_column: str = "answer",
        extract: str = "tag",
    ) -> None:
        """
        Args:
            subset: a configuration of the data set; None: the default one.
            revision: a branch, tag or commit; None: main.
        """
        super().__init__(question_column, answer_column, extract)
        self.id = id
        self.subset = None if subset is None else str(subset)
        self.revision = None if revision is None else str(revision)
        check_revision("dataset.revision", self.revision)
        self.found_commit: str | None = None  # set by rows()

    @property
    def commit(self) -> str | None:
        return self.found_commit

    def rows(self, split: str) -> Sequence[Row]:
        if self.id is None:
            raise ConfigError(
                "dataset.id is not set: give it as dataset.id=ORG/NAME", key="dataset.id"
            )
        if Path(self.id).exists() or not DATASET_ID.fullmatch(self.id):
            raise ConfigError(
                f"dataset.id={self.id}: should be ORG/NAME on the hub; for files, use "
                f"dataset=jsonl dataset.path=FOLDER.",
                key="dataset.id",
                value=self.id,
            )
        revision = self.found_commit or self.revision  # every split from the same commit
        rows, self.found_commit = read_hub(self.id, self.subset, split, revision)
        return rows


class GSM8K(Table):
    """Grade-school word problems (2110.14168); the gold answer is the number after `####`."""

    def __init__(
        self,
        path: str | None,
        extract: str = "tag",
        id: str = "openai/gsm8k",
        subset: str = "main",
        revision: str | int | None = None,
    ) -> None:
        """path: a file or folder as for Jsonl; None reads `id`, `subset`, `revision` from the hub.

        Raises:
            ConfigError: both `path` and `revision` are set.
        """
        super().__init__("question", "answer", extract)
        if path is not None and revision is not None:
            raise ConfigError(
                f"dataset.revision={revision}: dataset.path={path} is read instead of the hub, and "
                f"has no revisions; leave one of them out.",
                key="dataset.revision",
                value=revision,
            )
        self.source = Hub(id, subset, revision) if path is None else Jsonl(path)

    @property
    def commit(self) -> str | None:
        return self.source.commit

    def rows(self, split: str) -> Sequence[Row]:
        return self.source.rows(split)

    def parse_gold_answer(self, text: str, number: int) -> str:
        _, mark, gold = text.rpartition("####")
        if not mark:
            raise ConfigError(
                f"dataset: row {number + 1} has no '####' before its answer: {text[-60:]!r}. "
                f"Use dataset=jsonl for answers without this mark."
            )
        gold = gold.replace(",", "").replace("$", "").strip()
        if not gold:
            raise ConfigError(f"dataset: row {number + 1} has nothing after its last '####'.")
        return gold
