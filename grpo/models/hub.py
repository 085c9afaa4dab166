"""Downloads models from the Hugging Face hub, and finds out within seconds if it is unreachable."""

from __future__ import annotations

import re
import threading
from pathlib import Path

from grpo.config.validation import check_revision
from grpo.errors import ConfigError
from grpo.models.remote_code import list_code_files

HUB_TIMEOUT = 4.0  # seconds
# README.md has the licence.
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md"]
CODE_FILES = ["*.py"]
COMMIT_PATTERN = re.compile(r"[0-9a-f]{40}")


class HubUnreachable(Exception):
    """The hub doesn't answer, or doesn't have the files; the message says which."""


def fetch_hub_model(id: str, revision: str | None = None, *, with_code: bool = False) -> Path:
    """Returns the folder with a hub model's files: the cache's if it is complete, else downloaded.

    Args:
        revision: a branch, tag or commit; None is main.
        with_code: whether to download the model's Python code too.

    Raises:
        HubUnreachable: the model is not in the cache, and can't be downloaded.
        ConfigError: the id or the revision is malformed.
    """
    if cached := find_cached_model(id, revision, with_code=with_code):
        return cached
    folder = download_files(id, revision, [*MODEL_FILES, *(CODE_FILES if with_code else [])])
    if not any(folder.glob("*.safetensors")):
        folder = download_files(id, revision, ["pytorch_model*.bin*"])
    return folder


def fetch_hub_config(id: str, revision: str | None = None) -> Path:
    """Downloads a hub model's config.json alone, and returns its folder.

    Raises:
        HubUnreachable: it can't be downloaded.
    """
    return download_files(id, revision, ["config.json"])


def download_files(id: str, revision: str | None, patterns: list[str]) -> Path:
    """Downloads a hub model's files that match these patterns, and returns their folder.

    Raises:
        HubUnreachable: they can't be downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    require_hub()
    try:
        return Path(snapshot_download(id, revision=revision, allow_patterns=patterns))
    except RevisionNotFoundError as error:
        raise HubUnreachable("the hub has no such revision of it") from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise HubUnreachable(f"the hub answers: {str(error).splitlines()[0]}") from error


def find_cached_model(
    id: str, revision: str | None = None, *, with_code: bool = False
) -> Path | None:
    """Returns a hub model's folder in the local cache; None if its config or weights are not there.

    Args:
        revision: a branch, tag or commit; None is main.
        with_code: the model's Python code has to be there too.

    Raises:
        ConfigError: the id or the revision is malformed.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    check_revision("revision", revision)
    patterns = [*MODEL_FILES, *(CODE_FILES if with_code else [])]
    try:
        folder = Path(
            snapshot_download(id, revision=revision, allow_patterns=patterns, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise ConfigError(
            f"model.id={id}: write it as ORG/NAME.", key="model.id", value=id
        ) from error
    if with_code and not all((folder / name).is_file() for name in list_code_files(folder)):
        return None  # it was downloaded without its code
    return folder if holds_model(folder) else None


def format_revision(id: str, revision: str | None) -> str:
    """Returns the name of a hub model or data set, with its revision, for messages."""
    return id if revision is None else f"{id} at revision {revision}"


def read_commit(folder: Path) -> str | None:
    """Returns the commit of a model's folder in the hub's local cache; None for other folders."""
    return (
        folder.name if is_in_hub_cache(folder) and COMMIT_PATTERN.fullmatch(folder.name) else None
    )


def holds_model(folder: Path) -> bool:
    """Returns whether a folder has config.json and weights, as `save_pretrained` writes them."""
    weights = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    return weights and (folder / "config.json").is_file()


def holds_adapter(folder: Path) -> bool:
    """Returns whether a folder has an adapter without its base model."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def is_in_hub_cache(folder: Path) -> bool:
    """Returns whether a folder is in the hub's local cache."""
    from huggingface_hub import constants

    return folder.resolve().is_relative_to(Path(constants.HF_HUB_CACHE).expanduser().resolve())


def require_hub() -> None:
    """Checks that the hub answers within HUB_TIMEOUT seconds.

    Raises:
        HubUnreachable: it doesn't, or HF_HUB_OFFLINE is set.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise HubUnreachable("HF_HUB_OFFLINE is set")
    answered = threading.Event()

    def ask() -> None:
        try:
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
            answered.set()
        except Exception as error:  # noqa: BLE001 - every error means that there is no answer
            reason.append(type(error).__name__)
        finally:
            done.set()

    reason: list[str] = []
    done = threading.Event()
    # A DNS look-up has no time limit, so it runs in a thread that can be abandoned.
    threading.Thread(target=ask, daemon=True).start()
    done.wait(HUB_TIMEOUT)
    if not answered.is_set():
        raise HubUnreachable(f"the hub can't be reached ({reason[0] if reason else 'no answer'})")
