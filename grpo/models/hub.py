"""The Hugging Face hub, asked with a time limit: who has none should know within seconds."""

from __future__ import annotations

import re
import threading
from pathlib import Path

from grpo.config.validation import check_revision
from grpo.errors import ConfigError
from grpo.models.remote_code import list_code_files

HUB_TIMEOUT = 4.0
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md"]  # its licence
CODE_FILES = ["*.py"]
COMMIT_PATTERN = re.compile(r"[0-9a-f]{40}")


class HubUnreachable(Exception):
    """The hub doesn't answer, or doesn't have it; says which."""


def fetch_hub_model(id: str, revision: str | None = None, *, with_code: bool = False) -> Path:
    """The folder with a hub model's files: from the local cache where it is whole, else downloaded.

    Args:
        revision: a branch, tag or commit; None is main.
        with_code: the Python code beside the model too.

    Raises:
        HubUnreachable: it is not in the cache, and the hub can't give it.
    """
    if cached := find_cached_model(id, revision, with_code=with_code):
        return cached
    folder = download_files(id, revision, [*MODEL_FILES, *(CODE_FILES if with_code else [])])
    if not any(folder.glob("*.safetensors")):
        folder = download_files(id, revision, ["pytorch_model*.bin*"])
    return folder


def fetch_hub_config(id: str, revision: str | None = None) -> Path:
    """The folder with a hub model's config.json, if it has one, before the rest is downloaded.

    Raises:
        HubUnreachable: the hub can't give it.
    """
    return download_files(id, revision, ["config.json"])


def download_files(id: str, revision: str | None, patterns: list[str]) -> Path:
    """Downloads the files of a hub model with these names, and returns their folder.

    Raises:
        HubUnreachable: the hub can't give them.
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
    """The folder of a hub model that is in the local cache with its weights, at this revision.

    with_code: and with the Python code beside the model.

    Raises:
        ConfigError: the id or the revision is none that a hub could have.
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
        return None  # downloaded when its code was not asked for
    return folder if holds_model(folder) else None


def format_revision(id: str, revision: str | None) -> str:
    """How a message names a model or data set of the hub."""
    return id if revision is None else f"{id} at revision {revision}"


def read_commit(folder: Path) -> str | None:
    """The commit that a model's folder in the local cache of the hub holds; None of another one."""
    return (
        folder.name if is_in_hub_cache(folder) and COMMIT_PATTERN.fullmatch(folder.name) else None
    )


def holds_model(folder: Path) -> bool:
    """Whether a folder has a config and weights, as the hub and `save_pretrained` lay them out."""
    weights = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    return weights and (folder / "config.json").is_file()


def holds_adapter(folder: Path) -> bool:
    """Whether a folder has an adapter alone, whose base model is elsewhere."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def is_in_hub_cache(folder: Path) -> bool:
    """Whether a folder is the hub's local cache of a model."""
    from huggingface_hub import constants

    return folder.resolve().is_relative_to(Path(constants.HF_HUB_CACHE).expanduser().resolve())


def require_hub() -> None:
    """Returns where the hub answers within seconds.

    Raises:
        HubUnreachable: it doesn't.
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
        except Exception as error:  # noqa: BLE001 - whatever a client library raises, it is no answer
            reason.append(type(error).__name__)
        finally:
            done.set()

    reason: list[str] = []
    done = threading.Event()
    # A name look-up has no time limit of its own, so it runs where it can be left behind.
    threading.Thread(target=ask, daemon=True).start()
    done.wait(HUB_TIMEOUT)
    if not answered.is_set():
        raise HubUnreachable(f"the hub can't be reached ({reason[0] if reason else 'no answer'})")
