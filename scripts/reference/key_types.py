"""Finds the types of keys: in the schema, or in the classes that the config names."""

from __future__ import annotations

import inspect
import re
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from grpo.config import schema

TYPES = {"int": "whole number", "float": "number", "str": "text", "bool": "true or false"}


def find_type(name: str, file: Path, key: str) -> str:
    """The type of a key, from the schema, else from the class that its file names, else ''."""
    node: Any = schema.Config
    for part in name.split("."):
        if not is_dataclass(node):
            break
        node = get_type_hints(node).get(part)
        optional = [member for member in get_args(node) if member is not type(None)]
        if type(None) in get_args(node) and len(optional) == 1 and is_dataclass(optional[0]):
            node = optional[0]
    else:
        return spell_type(getattr(node, "__name__", None) if isinstance(node, type) else str(node))
    target = re.search(r"_target_: ([\w.]+)", file.read_text())
    if target and target[1].startswith(("grpo.", "hydra_plugins.")):
        module, _, attribute = target[1].rpartition(".")
        function = getattr(import_module(module), attribute)
        parameter = inspect.signature(function).parameters.get(key)
        if parameter is not None:
            return spell_type(str(parameter.annotation))
    return ""


def spell_type(annotation: str | None) -> str:
    """An annotation in words."""
    if annotation is None or "Any" in annotation:
        return ""
    words = []
    for part in re.split(r"\s*\|\s*", annotation.replace("typing.", "")):
        optional = re.fullmatch(r"Optional\[(\w+)\]", part)
        part = optional[1] if optional else part
        if part == "None":
            continue
        name = part.partition("[")[0]
        words.append(
            TYPES.get(name)
            or ("list" if name.lower() in ("list", "sequence", "tuple") else "")
            or ("mapping" if name.lower() in ("dict", "mapping") else "")
        )
    return " or ".join(filter(None, dict.fromkeys(words)))


def guess_type(default: str) -> str:
    """The type of a value in a file, where nothing else says it."""
    try:
        value = yaml.safe_load(default.strip("`"))
    except yaml.YAMLError:
        return ""
    if isinstance(value, bool):
        return TYPES["bool"]
    if isinstance(value, str) and re.fullmatch(r"[\d.]+e-?\d+", value):
        return TYPES["float"]  # which YAML 1.1 takes for a text
    return TYPES.get(
        type(value).__name__, {"list": "list", "dict": "mapping"}.get(type(value).__name__, "")
    )
