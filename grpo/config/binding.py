"""Imports the callable that a `_target_` names, and binds its options."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from grpo.config.suggest import find_nearest, format_suggestion
from grpo.config.validation import check_function_name
from grpo.errors import ConfigError


def resolve_node(cfg: DictConfig) -> dict[str, Any]:
    """Returns a node as plain Python, with its interpolations resolved."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def bind(
    node: Mapping[str, Any], key: str, other_keys: Collection[str] = ()
) -> functools.partial[Any]:
    """Returns the callable that a node's `_target_` names, with the node's other keys bound.

    Args:
        other_keys: keys of the node that are not options of the callable.

    Raises:
        ConfigError: it can't be imported, or doesn't take one of the keys.
    """
    options = resolve_node(node) if isinstance(node, DictConfig) else dict(node)
    target = import_callable(str(options.pop("_target_", "")), f"{key}._target_")
    check_options(target, options, key, other_keys)
    return functools.partial(target, **options)


def import_callable(path: str, key: str) -> Callable[..., Any]:
    """Imports the callable with this path.

    Raises:
        ConfigError: it can't be imported.
    """
    try:
        # Hydra's own way to a callable, with what it never lets a config name.
        found: Callable[..., Any] = instantiate({"_target_": path, "_partial_": True}).func
    except Exception as error:  # an import runs a user's module: whatever it raises, it is refused
        near = find_nearest_attributes(path)
        cause, meant = format_root_cause(error), format_suggestion(near) or "."
        raise ConfigError(
            f"{key}={path}: can't be imported ({cause}){meant}", key=key, value=path, nearest=near
        ) from error
    return found


def find_nearest_attributes(path: str) -> list[str]:
    """Returns the paths of a module's callables that look like this one; [] without the module."""
    module, _, name = path.rpartition(".")
    if module not in sys.modules:  # the attempt to import the callable has imported it
        return []
    names = [n for n, x in vars(sys.modules[module]).items() if callable(x) and n[:1] != "_"]
    return [f"{module}.{near}" for near in find_nearest(name, names)]


def resolve_name(name: str, table: Mapping[str, Any], key: str) -> Any:
    """Returns the entry of a table with this name, or the function with this dotted path.

    Raises:
        ConfigError: there is neither.
    """
    if name in table:
        return table[name]
    check_function_name(name, table, key)
    return import_callable(name, key)


def check_options(
    target: Callable[..., Any],
    options: Mapping[str, Any],
    key: str,
    other_keys: Collection[str] = (),
) -> None:
    """Refuses an option that the callable doesn't take, or that has a wrong type."""
    try:
        known = inspect.signature(target).parameters
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {target!r} can't be called.") from error
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    hints = read_type_hints(target)
    for option, value in options.items():
        if option not in known and not takes_any:
            name = getattr(target, "__qualname__", target)
            near = find_nearest(option, [*known, *other_keys])
            raise ConfigError(
                f"{key}.{option}: {name} takes no such key{format_suggestion(near)}",
                key=f"{key}.{option}", value=value, choices=known, nearest=near,
            )  # fmt: skip
        if not fits(value, hints.get(option, Any)):
            hint = hints[option]
            expected = hint.__name__ if isinstance(hint, type) else str(hint)
            raise ConfigError(
                f"{key}.{option}={value}: should be {expected}.", key=f"{key}.{option}", value=value
            )


def read_type_hints(target: Callable[..., Any]) -> dict[str, Any]:
    """Reads a callable's annotations; returns {} if they can't be resolved, as in a user's code."""
    try:
        return get_type_hints(vars(target)["__init__"] if isinstance(target, type) else target)
    except (NameError, TypeError, AttributeError, KeyError):
        return {}


def fits(value: object, hint: Any) -> bool:
    """Returns whether a value fits a simple annotation; any value fits another annotation."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if not set(kinds) <= {int, float, str, bool, type(None)}:
        return True
    return type(value) in kinds or (type(value) is int and float in kinds)


def format_root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0]
