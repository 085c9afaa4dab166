"""Tables in local files: one file, one per split, or several shards per split as on the hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from grpo.data.cells import FloatShortener, Row
from grpo.data.csv_rows import read_csv
from grpo.data.file_errors import file_error
from grpo.data.json_rows import read_json
from grpo.data.rows import MAX_EAGER_ROWS, JoinedRows, JsonlRows, Rows, TableRows

SHARD = re.compile(r"(?P<split>.+?)-(?P<number>\d{5,})(-of-(?P<all>\d+))?(-[0-9a-f]{16})?")


def read_path(path: str, split: str) -> Sequence[Row]:
    """Reads all rows of a file, used for every split, or of a split's files in a folder.

    Raises:
        ConfigError: a file is missing or can't be read; the message names it.
    """
    location = Path(path).expanduser()
    return read_files(find_split_files(location, split) if location.is_dir() else [location])


def read_rows(file: Path) -> Sequence[Row]:
    """Reads all rows of one file; raises as `read_files`."""
    return read_files([file])


def read_files(files: Sequence[Path]) -> Sequence[Row]:
    """Reads all rows of several files, in the order of the files.

    Raises:
        ConfigError: a file can't be read; the message names it, and the line.
    """
    parts = [choose_reader(file)(file) for file in files]
    rows = parts[0] if len(parts) == 1 else JoinedRows(parts)
    if not rows:
        raise file_error(files[0], "the file has no rows.")
    return rows if len(rows) > MAX_EAGER_ROWS else list(rows)


def choose_reader(file: Path) -> Callable[[Path], Rows]:
    if not file.is_file():
        raise file_error(file, "there is no such file.")
    if file.suffix.lower() not in READERS:
        raise file_error(file, f"use a {FILE_KINDS} file.")
    return READERS[file.suffix.lower()]


def read_parquet(file: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise file_error(file, f"not a parquet file ({error}).") from error
    types = {name: str(table.schema.field(name).type) for name in table.column_names}
    return TableRows(table, FloatShortener(types))


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": JsonlRows,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
FILE_KINDS = f"{', '.join(list(READERS)[:-1])} or {list(READERS)[-1]}"


def find_split_files(folder: Path, split: str) -> list[Path]:
    """Finds the files of a split: test.csv, test-00000-of-00002.parquet ..., or all in test/.

    They may also be in a folder data/. If there are several kinds, the first in READERS is used.

    Raises:
        ConfigError: there is no such split (the message names the others), or a shard is missing.
    """
    splits = group_by_split(folder)
    if not splits:
        raise file_error(folder, f"holds no {FILE_KINDS} file.")
    if split not in splits:
        raise file_error(
            folder,
            f"holds no split {split}, for example {split}.jsonl; it has "
            f"{', '.join(sorted(splits))}.",
        )
    kinds = list(READERS)
    of_kind = min((file.suffix.lower() for file in splits[split]), key=kinds.index)
    files = [file for file in splits[split] if file.suffix.lower() == of_kind]
    whole = [file for file in files if file.stem == split]
    if whole:  # any shards beside it hold the same rows
        return whole[:1]
    check_shards(folder, split, files)
    return sorted(files, key=shard_sort_key)


def shard_sort_key(file: Path) -> tuple[int, str]:
    shard = SHARD.fullmatch(file.stem)
    return int(shard["number"]) if shard else 0, file.name


def group_by_split(folder: Path) -> dict[str, list[Path]]:
    """Groups the readable files, sorted, by the split that their names or their folders name."""
    splits: dict[str, list[Path]] = {}
    for parent in (folder / "data", folder):  # a split in both is taken from the folder itself
        if not parent.is_dir():
            continue
        found: dict[str, list[Path]] = {}
        for entry in sorted(parent.iterdir()):
            if entry.is_dir() and entry != folder / "data":
                found.setdefault(entry.name, []).extend(list_readable(entry))
        for file in list_readable(parent):
            shard = SHARD.fullmatch(file.stem)
            found.setdefault(shard["split"] if shard else file.stem, []).append(file)
        splits |= {split: files for split, files in found.items() if files}
    return splits


def list_readable(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_file() and f.suffix.lower() in READERS)


def check_shards(folder: Path, split: str, files: Sequence[Path]) -> None:
    """Raises ConfigError if a shard is missing: the names of shards say how many there are."""
    shards = [shard for file in files if (shard := SHARD.fullmatch(file.stem)) and shard["all"]]
    wanted = {int(shard["all"]) for shard in shards}
    found = {int(shard["number"]) for shard in shards}
    if len(wanted) > 1:
        raise file_error(
            folder,
            f"holds shards of {split} that belong to different sets of "
            f"files: of {' and of '.join(map(str, sorted(wanted)))}.",
        )
    for total in wanted:
        if missing := sorted(set(range(total)) - found):
            raise file_error(
                folder,
                f"of the {total} shards of {split}, number {missing[0]} is "
                f"missing (they count from 0).",
            )
