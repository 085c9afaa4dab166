"""Data sets that are tables: files on disk, or on the hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from grpo.data.cells import Row, ShortFloats, as_messages, as_text, read_cell
from grpo.data.rows import EAGER, HubRows, JsonlRows, Rows, TableRows
from grpo.data.source import Source
from grpo.data.verify import answered, extractor
from grpo.errors import ConfigError
from grpo.types import Example
from grpo.verifiers.numbers import as_number


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
        asked, answer = self.question_column, self.answer_column
        value = read_cell(row, "question_column", asked, number)
        messages = as_messages(value, asked, number)
        if messages:
            question = "\n\n".join(message["content"] for message in messages)
        else:
            question = as_text(value, asked, number)
        written = as_text(read_cell(row, "answer_column", answer, number), answer, number)
        gold = self.gold_answer(written, number)
        if self.extract == "number" and as_number(gold) is None:
            raise ConfigError(
                f"dataset: row {number + 1} has {gold[:60]!r} in column {answer!r}, which is no "
                f"number, and dataset.extract=number reads nothing else."
            )
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
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"dataset.path={file}: not a parquet file ({error}).") from error
    types = {name: str(table.schema.field(name).type) for name in table.column_names}
    return TableRows(table, ShortFloats(types))


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
        found = datasets.load_dataset(id, subset, split=split)
        types = {name: getattr(kind, "dtype", "") for name, kind in found.features.items()}
        rows = HubRows(found, ShortFloats(types))
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
