"""Finds a model's files. It imports no torch, so a missing model is reported at once."""

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
    """Returns the model's folder, downloaded or converted if necessary.

    Exactly one of id, path and packaged is given.

    Args:
        name: the user's choice, for error messages, such as model=tiny.
        id: of the hub.
        path: a folder of the user.
        packaged: the name of a folder in this package.
        wheel: arguments of `convert_gguf`, for use if the hub can't be reached.
        revision: of the id; None is main.
        trust_remote_code: code that comes with the model may be run, so it is downloaded too.

    Raises:
        ConfigError: no model is there, the hub can't be reached, or the model needs code that isn't
            trusted.
    """
    if packaged is not None:
        return PACKAGE_FOLDER / packaged
    if path is not None:
        return require_whole_model("model.path", path)
    assert id is not None  # config.check makes sure of it
    try:
        return fetch_checked_hub_model(id, revision, trust_remote_code)
    except HubUnreachable as error:
        if wheel is not None and revision is None:
            log.info("%s: %s; using the GGUF in %s instead", id, error, wheel["name"])
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
    """Checks that `find_model_folder` will find the model, without downloading it.

    Raises:
        ConfigError: as `find_model_folder` does. For a model that is not in the cache, it checks
            only that the hub answers.
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
    """Returns an error message that names the models which need no hub."""
    return (
        f"{name}: {format_revision(id, revision)} is not in the local cache and {error}. Without "
        f"the hub, use model=tiny, model=smollm2_135m (from PyPI) or model=local "
        f"model.path=FOLDER."
    )


def fetch_checked_hub_model(id: str, revision: str | None, trust_remote_code: bool) -> Path:
    """Calls `fetch_hub_model`, after it has checked that the model needs no untrusted code.

    Raises:
        HubUnreachable: the model is not in the cache, and can't be downloaded.
        ConfigError: the model needs code that isn't trusted.
    """
    if not trust_remote_code and find_cached_model(id, revision) is None:
        config = fetch_hub_config(id, revision)
        check_remote_code(config, trust_remote_code, format_revision(id, revision))
    return fetch_hub_model(id, revision, with_code=trust_remote_code)


def find_base_folder(folder: Path, trust_remote_code: bool = False) -> Path:
    """Returns the folder itself, or the folder of the base model if it holds an adapter.

    Raises:
        ConfigError: the base model can't be found, or needs code that isn't trusted.
    """
    if not holds_adapter(folder):
        return folder
    adapter = json.loads((folder / "adapter_config.json").read_text())
    base, revision = str(adapter["base_model_name_or_path"]), adapter.get("revision")
    if Path(base).is_absolute():
        if holds_model(Path(base)):
            return Path(base)
        raise ConfigError(
            f"{folder}: this adapter's base model was in {base}, which holds no model now; put it "
            f"back there."
        )
    try:
        return fetch_checked_hub_model(base, revision, trust_remote_code)
    except HubUnreachable as error:
        raise ConfigError(
            f"{folder}: this adapter's base model, {format_revision(base, revision)}, is not in "
            f"the cache and {error}."
        ) from error


def require_whole_model(key: str, path: str) -> Path:
    """Returns the path as a folder, after it has checked that it holds a model, not an adapter.

    Args:
        key: the config key of the path, for error messages.

    Raises:
        ConfigError: the folder holds no model, or only an adapter.
    """
    folder = require_local_folder(key, path)
    if holds_adapter(folder):
        raise ConfigError(
            f"{key}={path}: holds only an adapter. To continue training, resume its run, or merge "
            f"it into a model: grpo export RUN FOLDER",
            key=key,
            value=path,
        )
    return folder


def require_local_folder(key: str, path: str) -> Path:
    """Returns the path as a folder, after it has checked that it holds a model or an adapter.

    Args:
        key: the config key of the path, for error messages.

    Raises:
        ConfigError: the folder holds neither.
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
    """Returns whether the weights in a model's folder are quantized."""
    return "quantization_config" in json.loads((folder / "config.json").read_text())
