"""Data sets that are tables: files on disk, or on the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.data.rows import EAGER, HubRows, JsonlRows, Row, Rows, TableRows
from grpo.data.source import Source
from grpo.data.verify import answered, extractor
from grpo.errors import ConfigError
from grpo.types import Example


class Jsonl(Source):
    """Rows of a .jsonl or .parquet file: one column asks, another holds the answer."""

    def __init__(
        self,
        path: str | None,
        question_column: str = "question",
        answer_column: str = "answer",
        extract: str = "tag",
    ) -> None:
        """path: one file, which is every split, or a folder with a file named by each split."""
        self.path = path
        self.question_column, self.answer_column = question_column, answer_column
        extractor(extract)
        self.extract = extract

    def rows(self, split: str) -> Sequence[Row]:
        if self.path is None:
            raise ConfigError("dataset.path is not set: name a .jsonl or .parquet file.")
        return read_file(split_file(self.path, split))

    def example(self, row: Row, number: int) -> Example:
        value = present(row, "question_column", self.question_column, number)
        messages = as_messages(value, self.question_column, number)
        question = "\n\n".join(m["content"] for m in messages) if messages else str(value)
        answer = str(present(row, "answer_column", self.answer_column, number))
        gold = self.gold_answer(answer, number)
        return answered(question, gold, self.extract, row, messages)

    def gold_answer(self, text: str, number: int) -> str:
        """What stands in the answer column, as an answer to compare with."""
        return text.strip()


class GSM8K(Jsonl):
    """Grade-school word problems (2110.14168); the gold answer is the number behind `####`."""

    def __init__(
        self,
        path: str | None,
        extract: str = "tag",
        id: str = "openai/gsm8k",
        subset: str = "main",
    ) -> None:
        """path: a file or folder as for Jsonl; None asks the hub for `id` and `subset`."""
        super().__init__(path, extract=extract)
        self.id, self.subset = id, subset

    def rows(self, split: str) -> Sequence[Row]:
        if self.path is None:
            return read_hub(self.id, self.subset, split)
        return super().rows(split)

    def gold_answer(self, text: str, number: int) -> str:
        _, mark, gold = text.rpartition("####")
        if not mark:
            raise ConfigError(
                f"dataset: row {number + 1} has no '####' before its answer: {text[-60:]!r}. "
                f"Use dataset=jsonl for answers written as they are."
            )
        gold = gold.replace(",", "").replace("$", "").strip()
        if not gold:
            raise ConfigError(f"dataset: row {number + 1} has nothing behind its last '####'.")
        return gold


def split_file(path: str, split: str) -> Path:
    """The file of a split: the one named by it in a folder, or the one file itself."""
    given = Path(path).expanduser()
    if not given.is_dir():
        return given
    for suffix in READERS:
        file = given / f"{split}{suffix}"
        if file.is_file():
            return file
    raise ConfigError(f"dataset.path={path}: holds no {' or '.join(split + s for s in READERS)}.")


def read_file(file: Path) -> Sequence[Row]:
    """All rows of a file.

    Raises:
        ConfigError: naming the file, and the line where a .jsonl is not JSON.
    """
    if not file.is_file():
        raise ConfigError(f"dataset.path={file}: there is no such file.")
    if file.suffix not in READERS:
        raise ConfigError(f"dataset.path={file}: use a .jsonl or .parquet file.")
    rows = READERS[file.suffix](file)
    if not rows:
        raise ConfigError(f"dataset.path={file}: the file has no rows.")
    return rows if len(rows) > EAGER else list(rows)


def read_parquet(file: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        return TableRows(pyarrow.parquet.read_table(file))
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"dataset.path={file}: not a parquet file ({error}).") from error


READERS: dict[str, Callable[[Path], Rows]] = {".jsonl": JsonlRows, ".parquet": read_parquet}


def read_hub(id: str, subset: str, split: str) -> Sequence[Row]:
    """A split of a hub data set, from the local cache where the hub can't be reached."""
    import datasets

    from grpo.hub import HubUnreachable, require_hub

    offline, unreachable = datasets.config.HF_HUB_OFFLINE, None
    try:
        require_hub()
    except HubUnreachable as error:
        datasets.config.HF_HUB_OFFLINE, unreachable = True, error  # straight to the cache
    try:
        rows = HubRows(datasets.load_dataset(id, subset, split=split))
        return rows if len(rows) > EAGER else list(rows)
    except (ConnectionError, OSError) as error:
        raise ConfigError(
            f"dataset: {id} is not in the local cache and {unreachable or error}. Use "
            f"dataset.path= with a local .jsonl or .parquet, or dataset=arithmetic, which is "
            f"generated."
        ) from error
    except ValueError as error:
        raise ConfigError(f"dataset.split={split}: {error}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def present(row: Row, key: str, name: str, number: int) -> Any:
    """What a row has in a column.

    Raises:
        ConfigError: there is no such column, or nothing in it.
    """
    if name not in row:
        raise ConfigError(
            f"dataset.{key}={name}: row {number + 1} has no such column; it has {', '.join(row)}."
        )
    value = row[name]
    if value is None or not str(value).strip():
        raise ConfigError(f"dataset: row {number + 1} has nothing in column {name!r}.")
    return value


def as_messages(value: Any, name: str, number: int) -> tuple[Mapping[str, str], ...]:
    """A column that holds a chat, [{role: ..., content: ...}]; empty where it holds a text.

    Raises:
        ConfigError: it is neither.
    """
    if not isinstance(value, list):
        return ()
    for message in value:
        texts = isinstance(message, dict) and [message.get("role"), message.get("content")]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ConfigError(
                f"dataset: row {number + 1} has a list in column {name!r} whose items are not all "
                f"messages: {{role: ..., content: ...}}."
            )
    if not value or value[-1]["role"] == "assistant":
        raise ConfigError(
            f"dataset: row {number + 1}: the chat in column {name!r} leaves nothing to answer."
        )
    return tuple(value)
