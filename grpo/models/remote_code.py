"""Checks for Python code that comes with a model, which runs only if the user trusts it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo.errors import ConfigError

NEEDS_CODE = (
    "needs Python code that comes with it, which is not run unless you trust it: read it, then add "
    "model.trust_remote_code=true (to grpo chat and grpo export: --trust)"
)


class UntrustedCode(ConfigError):
    """A model can't be loaded without running code that comes with it."""


def check_remote_code(folder: Path, trusted: bool, name: str = "") -> None:
    """Refuses a model that transformers can't load without untrusted code.

    Args:
        trusted: the user allows that code to run.
        name: the model's name for the message; by default its folder.

    Raises:
        UntrustedCode: naming the model, its files and the key.
    """
    if trusted or not list_auto_classes(folder, "config.json") or has_builtin_class(folder):
        return
    files = ", ".join(list_code_files(folder)) or "in another repository of the hub"
    raise UntrustedCode(f"{name or folder}: this model {NEEDS_CODE}. The code: {files}.")


def has_remote_code(folder: Path) -> bool:
    """Returns whether configs in a model's folder name classes outside of transformers."""
    return any(list_auto_classes(folder, name) for name in ("config.json", "tokenizer_config.json"))


def list_code_files(folder: Path) -> list[str]:
    """Returns the Python files in a model's folder that its configs name."""
    named = {
        path
        for name in ("config.json", "tokenizer_config.json")
        for path in list_auto_classes(folder, name)
    }
    return sorted({f"{path.partition('.')[0]}.py" for path in named if "--" not in path})


def has_builtin_class(folder: Path) -> bool:
    """Returns whether transformers itself has the class of the causal model in a folder."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = read_model_config(folder / "config.json").get("model_type")
    return kind in CONFIG_MAPPING_NAMES and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def list_auto_classes(folder: Path, name: str) -> list[str]:
    """Returns the classes in a config's `auto_map`: module.Class, or ORG/NAME--module.Class."""
    return list(find_strings(read_model_config(folder / name).get("auto_map")))


def find_strings(node: Any) -> Iterator[str]:
    """Yields all strings in nested lists and objects; a tokenizer has a list, maybe with null."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from find_strings(value)


def read_model_config(file: Path) -> dict[str, Any]:
    """Reads a config of transformers; empty if unreadable, which loading the model will report."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
