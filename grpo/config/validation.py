"""Refuses single values: numbers, choices, folders."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryFile

from omegaconf import DictConfig, OmegaConf

from grpo.config.suggest import find_nearest, format_suggestion
from grpo.errors import ConfigError


def check_at_least(
    cfg: DictConfig, key: str, minimum: float, *, whole: bool = False, optional: bool = False
) -> None:
    """Refuses a number below a minimum. optional: null is accepted."""
    value = OmegaConf.select(cfg, key)
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        given = "null" if value is None else value
        kind = f"{'whole ' if whole else ''}number"
        raise ConfigError(f"{key}={given}: should be a {kind}.", key=key, value=value)
    if not (value >= minimum and math.isfinite(value)):
        unset = "; write null to leave it open" if optional else ""
        raise ConfigError(
            f"{key}={value}: must be at least {minimum:g}{unset}.", key=key, value=value
        )


def check_choice(cfg: DictConfig, key: str, choices: tuple[str, ...]) -> None:
    value = OmegaConf.select(cfg, key)
    if value not in choices:
        near = find_nearest(str(value), choices)
        raise ConfigError(
            f"{key}={value}: use one of {', '.join(choices)}{format_suggestion(near)}",
            key=key, value=value, choices=choices, nearest=near,
        )  # fmt: skip


def check_function_name(name: str, known: Collection[str], key: str) -> None:
    """Refuses an unknown bare name; a dotted name is a function of the user's."""
    if name not in known and "." not in name:
        near = find_nearest(name, known)
        raise ConfigError(
            f"{key}={name}: use one of {', '.join(known)}, or a function of your own as "
            f"module.function{format_suggestion(near)}",
            key=key, value=name, choices=list(known), nearest=near,
        )  # fmt: skip


def check_positive(cfg: DictConfig, key: str, maximum: float = math.inf) -> None:
    value = OmegaConf.select(cfg, key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key}={value}: should be a number.", key=key, value=value)
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{key}={value}: must be more than 0.", key=key, value=value)
    if value > maximum:
        raise ConfigError(f"{key}={value}: must be at most {maximum:g}.", key=key, value=value)


def check_writable(folder: Path, key: str) -> None:
    """Refuses a folder that can't be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):  # its own name: two processes may try at once
            pass
    except OSError as error:
        raise ConfigError(
            f"{key}={folder}: this folder can't be made or written ({error.strerror}).",
            key=key, value=str(folder),
        ) from error  # fmt: skip


def check_could_write(folder: Path, key: str) -> None:
    """Refuses a folder that can't be written or made; makes nothing itself."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    check_writable(there, key)


REVISION = re.compile(r"(?!.*\.\.)[\w+@-][\w./+@-]*")  # no way out of the cache's folder


def check_revision(key: str, revision: str | None) -> None:
    """Raises ConfigError, which names `key`, for a revision that no hub could have."""
    if revision is not None and not REVISION.fullmatch(revision):
        raise ConfigError(
            f"{key}={revision}: should be a branch, a tag or a commit of the hub.",
            key=key, value=revision,
        )  # fmt: skip
