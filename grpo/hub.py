"""The Hugging Face hub, asked with a time limit: who has none should know within seconds."""

from __future__ import annotations

import threading
from pathlib import Path

from grpo.errors import ConfigError

SECONDS = 4.0
FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md"]  # its licence


class HubUnreachable(Exception):
    """The hub doesn't answer, or doesn't have it; says which."""


def hub_model_folder(id: str) -> Path:
    """The folder with a hub model's files: from the local cache where it is whole, else downloaded.

    Raises:
        HubUnreachable: it is not in the cache, and the hub can't give it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if cached := cached_model(id):
        return cached
    require_hub()
    try:
        folder = Path(snapshot_download(id, allow_patterns=FILES))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(id, allow_patterns=["pytorch_model*.bin*"]))
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise HubUnreachable(f"the hub answers: {str(error).splitlines()[0]}") from error


def cached_model(id: str) -> Path | None:
    """The folder of a hub model that is in the local cache with its weights.

    Raises:
        ConfigError: the id is none that a hub could have.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(id, allow_patterns=FILES, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise ConfigError(f"model.id={id}: write it as ORG/NAME.") from error
    return folder if holds_model(folder) else None


def holds_model(folder: Path) -> bool:
    """Whether a folder has a config and weights, as the hub and `save_pretrained` lay them out."""
    weights = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    return weights and (folder / "config.json").is_file()


def holds_adapter(folder: Path) -> bool:
    """Whether a folder has an adapter alone, whose base model is elsewhere."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def from_hub(folder: Path) -> bool:
    """Whether a folder is the hub's local cache of a model."""
    from huggingface_hub import constants

    return folder.is_relative_to(constants.HF_HUB_CACHE)


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
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=SECONDS)
            answered.set()
        except Exception as error:  # noqa: BLE001 - whatever a client library raises, it is no answer
            reason.append(type(error).__name__)
        finally:
            done.set()

    reason: list[str] = []
    done = threading.Event()
    # A name look-up has no time limit of its own, so it runs where it can be left behind.
    threading.Thread(target=ask, daemon=True).start()
    done.wait(SECONDS)
    if not answered.is_set():
        raise HubUnreachable(f"the hub can't be reached ({reason[0] if reason else 'no answer'})")
