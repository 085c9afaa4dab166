"""Where a model's files are. Needs no torch, so what is not there is told at once."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from grpo.errors import ConfigError
from grpo.hub import (
    HubUnreachable,
    cached_model,
    holds_adapter,
    holds_model,
    hub_model_folder,
    require_hub,
)
from grpo.models.gguf import converted_gguf

log = logging.getLogger(__name__)
PACKAGED = Path(__file__).parent


def model_folder(
    name: str, id: str | None, path: str | None, packaged: str | None, wheel: dict[str, str] | None
) -> Path:
    """The folder of exactly one of id, path and packaged, downloaded or converted if need be.

    name: as the user gave it, for messages: model=tiny

    Raises:
        ConfigError: there is no model there, or the hub can't be reached.
    """
    if packaged is not None:
        return PACKAGED / packaged
    if path is not None:
        return whole_model("model.path", path)
    assert id is not None  # config.check saw to it
    try:
        return hub_model_folder(id)
    except HubUnreachable as error:
        if wheel is not None:
            log.info("%s: %s; taking the GGUF in %s instead", id, error, wheel["name"])
            return converted_gguf(**wheel)
        raise ConfigError(unreachable(name, id, error)) from error


def check_reachable(
    name: str, id: str | None, path: str | None, packaged: str | None, wheel: dict[str, str] | None
) -> None:
    """Whether `model_folder` has something to find, without downloading anything.

    Raises:
        ConfigError: as `model_folder` would.
    """
    if id is None or wheel is not None:
        if path is not None:
            whole_model("model.path", path)
        return
    try:
        if cached_model(id) is None:
            require_hub()
    except HubUnreachable as error:
        raise ConfigError(unreachable(name, id, error)) from error


def unreachable(name: str, id: str, error: HubUnreachable) -> str:
    return (
        f"{name}: {id} is not in the local cache and {error}. Without the hub there are "
        f"model=tiny, model=smollm2_135m (from PyPI) and model=local model.path=FOLDER."
    )


def base_folder(folder: Path) -> Path:
    """The folder itself, or that of the base model of the adapter in it.

    Raises:
        ConfigError: that base model can't be had.
    """
    if not holds_adapter(folder):
        return folder
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    if Path(str(base)).is_absolute():
        if holds_model(Path(base)):
            return Path(base)
        raise ConfigError(f"{folder}: the model under this adapter was {base}, where none is now.")
    try:
        return hub_model_folder(str(base))
    except HubUnreachable as error:
        raise ConfigError(
            f"{folder}: the model under this adapter, {base}, is not in the cache and {error}."
        ) from error


def whole_model(key: str, path: str) -> Path:
    """A folder that holds a model with all its weights, to begin training with.

    Raises:
        ConfigError: naming `key`; it doesn't.
    """
    folder = local_folder(key, path)
    if holds_adapter(folder):
        raise ConfigError(
            f"{key}={path}: holds an adapter alone. To train on from it, resume its run, or make a "
            f"model of it: grpo export RUN FOLDER"
        )
    return folder


def local_folder(key: str, path: str) -> Path:
    """A folder that holds a model.

    Raises:
        ConfigError: naming `key`; it doesn't.
    """
    folder = Path(path).expanduser()
    if not (holds_model(folder) or holds_adapter(folder)):
        raise ConfigError(
            f"{key}={path}: no model there. It should be a folder with config.json, "
            f"*.safetensors and a tokenizer, as `save_pretrained` writes it."
        )
    return folder


def is_quantized(folder: Path) -> bool:
    """Whether the weights in a model's folder are quantized."""
    return "quantization_config" in json.loads((folder / "config.json").read_text())
