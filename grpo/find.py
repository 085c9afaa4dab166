"""What a run needs and can be found without torch: its rows and its model's files.

So a file that is missing, a row without an answer or a hub that can't be reached is told within
seconds, before anything heavy is even imported.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from grpo.config import nearest
from grpo.data.source import Slices, Source
from grpo.errors import ConfigError
from grpo.models.find import check_reachable, model_folder
from grpo.past import model_of_checkpoint
from grpo.types import Example

SLICE_KEYS = ("split", "slice", "eval_split", "eval_slice")
PROMPT_KEYS = ("system_prompt", "worked_examples", "max_prompt_tokens", "allow_overlap")


@dataclass(frozen=True)
class Found:
    """The rows and the model that a run starts from."""

    train: list[Example]
    evaluation: list[Example]
    model: Callable[[], Path]  # its folder; the call downloads it where need be


def find_for_training(cfg: DictConfig) -> Found:
    """Raises ConfigError where rows or model can't be had."""
    source, slices = build_source(cfg), build_slices(cfg)
    train, evaluation = slices.train(source), slices.evaluation(source)
    model = plain(cfg.model)
    where = {key: model[key] for key in ("name", "id", "path", "packaged", "wheel")}
    check_reachable(**where)
    return Found(train, evaluation, functools.partial(model_folder, **where))


def find_for_evaluation(cfg: DictConfig) -> Found:
    """Raises ConfigError where rows or checkpoint can't be had."""
    if cfg.checkpoint is None:
        raise ConfigError("checkpoint is not set: grpo eval checkpoint=DIR, a run's or a model's.")
    source, slices = build_source(cfg), build_slices(cfg)
    folder = model_of_checkpoint(str(cfg.checkpoint))
    return Found([], slices.evaluation(source), lambda: folder)


def build_source(cfg: DictConfig) -> Source:
    own = [key for key in cfg.dataset if key not in (*SLICE_KEYS, *PROMPT_KEYS)]
    source = bind(OmegaConf.masked_copy(cfg.dataset, own), "dataset")()
    if not isinstance(source, Source):
        raise ConfigError(
            f"dataset._target_={cfg.dataset._target_}: is no grpo.data.source.Source."
        )
    return source


def build_slices(cfg: DictConfig) -> Slices:
    return Slices(**{key: str(cfg.dataset[key]) for key in SLICE_KEYS})


def plain(cfg: DictConfig) -> dict[str, Any]:
    """A node as plain Python, interpolations resolved."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def bind(node: Mapping[str, Any], key: str) -> functools.partial[Any]:
    """The callable that a node's `_target_` names, with the node's other keys bound.

    Raises:
        ConfigError: it can't be imported, or doesn't take one of the keys.
    """
    options = plain(node) if isinstance(node, DictConfig) else dict(node)
    target = imported(str(options.pop("_target_", "")), f"{key}._target_")
    check_options(target, options, key)
    return functools.partial(target, **options)


def imported(path: str, key: str) -> Callable[..., Any]:
    """The callable of this path.

    Raises:
        ConfigError: it can't be imported.
    """
    try:
        found: Callable[..., Any] = get_object(path)
    except Exception as error:  # an import runs a user's module: whatever it raises, it is refused
        raise ConfigError(f"{key}={path}: can't be imported ({root_cause(error)}).") from error
    return found


def named(name: str, table: Mapping[str, Any], key: str) -> Any:
    """What a bare name stands for in a table, or the function that a whole path names.

    Raises:
        ConfigError: it is neither.
    """
    if name in table:
        return table[name]
    if "." not in name:
        raise ConfigError(
            f"{key}={name}: use one of {', '.join(table)}, or a function of your own as "
            f"module.function{nearest(name, table)}"
        )
    return imported(name, key)


def check_options(target: Callable[..., Any], options: Mapping[str, Any], key: str) -> None:
    """Refuses an option that a callable doesn't take, or whose value is of another type."""
    try:
        known = inspect.signature(target).parameters
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {target!r} can't be called.") from error
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    hints = type_hints(target)
    for option, value in options.items():
        if option not in known and not takes_any:
            name = getattr(target, "__qualname__", target)
            raise ConfigError(f"{key}.{option}: {name} takes no such key{nearest(option, known)}")
        if not fits(value, hints.get(option, Any)):
            hint = hints[option]
            expected = hint.__name__ if isinstance(hint, type) else str(hint)
            raise ConfigError(f"{key}.{option}={value}: should be {expected}.")


def type_hints(target: Callable[..., Any]) -> dict[str, Any]:
    """A callable's annotations, where they can be resolved; a user's own may name anything."""
    try:
        return get_type_hints(vars(target)["__init__"] if isinstance(target, type) else target)
    except (NameError, TypeError, AttributeError, KeyError):
        return {}


def fits(value: object, hint: Any) -> bool:
    """Whether a value is what a plain annotation asks for; other ones take anything."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if not set(kinds) <= {int, float, str, bool, type(None)}:
        return True
    return type(value) in kinds or (type(value) is int and float in kinds)


def root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0]
