"""Data sets on the hub, read by the datasets library: downloaded, or from its local cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo.data.cells import FloatShortener, Row
from grpo.data.rows import MAX_EAGER_ROWS, HubRows
from grpo.errors import ConfigError, format_error
from grpo.models.hub import COMMIT_PATTERN, HubUnreachable, format_revision, require_hub


def read_hub(
    id: str, subset: str | None, split: str, revision: str | None = None
) -> tuple[Sequence[Row], str | None]:
    """Reads a split of a hub data set; returns its rows and the commit that they are from.

    Args:
        subset: a configuration of the data set; None: the default one.
        revision: a branch, tag or commit; None: main, or if the hub can't be reached, the newest
            one in the local cache.

    Raises:
        ConfigError: the data set is not available, or has no such subset or split.
    """
    import datasets

    wanted, unreachable = format_revision(id, revision), None
    try:
        require_hub()
    except HubUnreachable as error:
        unreachable = error
    try:
        found = load_split(id, subset, split, revision, offline=unreachable is not None)
    except (ConnectionError, OSError) as error:
        reason = unreachable or format_error(error).rstrip(".")
        raise ConfigError(
            f"dataset: {wanted} is not in the local cache and {reason}. Without the hub, use "
            f"local files (dataset.path= with dataset=gsm8k or jsonl) or dataset=arithmetic, which "
            f"is generated."
        ) from error
    except ValueError as error:
        key = "subset is not set" if subset is None else f"subset={subset}"
        of_subset = "onfig" in str(error)  # datasets calls it a configuration
        raise ConfigError(
            f"dataset.{key if of_subset else f'split={split}'}: {format_error(error)}"
        ) from error
    except (RuntimeError, datasets.exceptions.DatasetsError) as error:  # a script, mixed columns
        raise ConfigError(f"dataset: {wanted} can't be read: {format_error(error)}") from error
    types = {name: getattr(kind, "dtype", "") for name, kind in found.features.items()}
    rows = HubRows(found, FloatShortener(types))
    return rows if len(rows) > MAX_EAGER_ROWS else list(rows), find_split_commit(found)


def load_split(id: str, subset: str | None, split: str, revision: str | None, offline: bool) -> Any:
    """Loads a split with the datasets library, but never another revision than the one given.

    If the library can't get that revision, it would load the newest one in its cache.

    Raises:
        ConnectionError: the revision is neither on a reachable hub nor in the cache.
    """
    import datasets

    if revision is None or not offline:
        before = datasets.config.HF_HUB_OFFLINE
        datasets.config.HF_HUB_OFFLINE = before or offline  # read the cache at once
        try:
            found = datasets.load_dataset(id, subset, split=split, revision=revision)
        finally:
            datasets.config.HF_HUB_OFFLINE = before
        if revision is None or find_split_commit(found) == find_cached_commit(id, revision):
            return found
    commit = find_cached_commit(id, revision)
    if commit is None:
        raise ConnectionError("the hub didn't provide it")
    return load_cached_split(id, subset, split, commit)


def load_cached_split(id: str, subset: str | None, split: str, commit: str) -> Any:
    """Loads a split of one commit from the cache of the datasets library.

    Raises:
        ConnectionError: that commit is not in the cache.
        ValueError: it has no such subset or split.
    """
    import datasets
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    owner, _, name = id.rpartition("/")
    folder = f"{owner}___{camelcase_to_snakecase(name)}" if owner else camelcase_to_snakecase(name)
    root = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / folder
    subsets = {place.parent.parent.name: place for place in root.glob(f"*/*/{commit}")}
    if not subsets:
        raise ConnectionError("the hub didn't provide it")
    chosen = subset or ("default" if "default" in subsets else next(iter(subsets)))
    if chosen not in subsets or (subset is None and chosen != "default" and len(subsets) > 1):
        raise ValueError(f"the cache has only its configurations {', '.join(sorted(subsets))}")
    builder = Cache(
        dataset_name=name,
        repo_id=id,
        config_name=chosen,
        version=subsets[chosen].parent.name,
        hash=commit,
    )
    return builder.as_dataset(split=split)


def find_cached_commit(id: str, revision: str | None) -> str | None:
    """Returns the commit of a revision when the hub was last asked for it; None if unknown."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if revision is None or COMMIT_PATTERN.fullmatch(revision):
        return revision
    folder = repo_folder_name(repo_id=id, repo_type="dataset")
    file = Path(constants.HF_HUB_CACHE).expanduser() / folder / "refs" / revision
    return file.read_text().strip() if file.is_file() else None


def find_split_commit(split: Any) -> str | None:
    """Returns the hub commit that a loaded split was made from, or None."""
    files = split.cache_files
    name = Path(files[0]["filename"]).parent.name if files else ""
    return name if COMMIT_PATTERN.fullmatch(name) else None
