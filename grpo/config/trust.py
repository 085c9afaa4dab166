"""Decides what a run's folder may have run: a stranger's folder is data, not a program.

`grpo eval checkpoint=DIR`, `grpo resume=DIR` and `grpo -m sweep_dir=DIR` take overrides from that
folder, and overrides can name any function. Functions of this package and of files in the working
directory are trusted; all others are refused unless `--trust` is given. So is
`model.trust_remote_code=true`, which runs a model's own code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from grpo.errors import ConfigError

PACKAGE_NAME = "grpo"
HARMLESS_SETTINGS = re.compile(  # of Hydra's own settings: they say where and how many, not what
    r"hydra/launcher=(basic|joblib|ray|submitit_local|submitit_slurm|slurm)"
    r"|hydra/sweeper=(grid|optuna)"
    r"|hydra\.(mode|verbose|run\.dir|sweep\.(dir|subdir)|(sweeper|launcher)\.[\w.]+|job\.name)=.*"
)


@dataclass
class OverrideSource:
    """The folder that some of this command's overrides come from, if any."""

    folder: Path | None = None
    given_keys: tuple[str, ...] = ()  # the keys of the command line itself
    folder_keys: tuple[str, ...] = ()  # those of the folder that are not given anew

    def is_given(self, key: str) -> bool:
        """Returns whether the user is responsible for a key.

        The most specific override of the key decides.
        """
        theirs, others = (
            max(
                (len(prefix) for prefix in keys if key == prefix or key.startswith(f"{prefix}.")),
                default=0,
            )
            for keys in (self.given_keys, self.folder_keys)
        )
        return theirs > others


OVERRIDE_SOURCE = OverrideSource()


def check_folder_overrides(
    folder: Path, overrides: Sequence[str], config_dir: str | None, given: Sequence[str]
) -> None:
    """Notes that overrides come from this folder, and refuses those that change what Hydra runs.

    Args:
        config_dir: the config folder that the run's folder names, if any.
        given: the overrides of the command line, for which the user is responsible.

    Raises:
        ConfigError: an override sets what Hydra runs, or the configs are not the user's own.
    """
    given_keys, past_keys = (
        [override.partition("=")[0].lstrip("+~").replace("/", ".") for override in part]
        for part in (given, overrides)
    )
    OVERRIDE_SOURCE.folder = folder
    OVERRIDE_SOURCE.given_keys = tuple(given_keys)
    OVERRIDE_SOURCE.folder_keys = tuple(key for key in past_keys if key not in given_keys)
    for override in overrides:
        setting = override.lstrip("+~")
        if setting.startswith("hydra") and (
            "_target_" in setting or not HARMLESS_SETTINGS.fullmatch(setting)
        ):
            raise make_refusal(folder, f"{override}, a setting of Hydra's that may run code")
    if config_dir is not None and not is_users_file(Path(config_dir)):
        raise make_refusal(folder, f"configs in {config_dir}, outside the working directory")


def check_code(cfg: DictConfig) -> None:
    """Refuses a config from a folder that names code of neither this package nor the user.

    Raises:
        ConfigError: names the key and the function.
    """
    if OVERRIDE_SOURCE.folder is None:
        return
    for key, path in find_function_keys(OmegaConf.to_container(cfg, resolve=True)):  # type: ignore[arg-type]
        if not (OVERRIDE_SOURCE.is_given(key) or is_trusted(path)):
            raise make_refusal(OVERRIDE_SOURCE.folder, f"{key}={path}")
    if cfg.model.trust_remote_code and not OVERRIDE_SOURCE.is_given("model.trust_remote_code"):
        raise ConfigError(
            f"{OVERRIDE_SOURCE.folder}: says model.trust_remote_code=true, which runs Python code "
            f"from the model's folder. Read that, and add --trust to run it."
        )


def make_refusal(folder: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{folder}: names {what}; it is neither part of this package nor in your working "
        f"directory. Read it, and add --trust to run it."
    )


def find_function_keys(node: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields each key that names a function, with the function's path."""
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from find_function_keys(value, f"{name}.")
        elif key == "_target_" or (isinstance(value, str) and is_function_key(name, value)):
            yield name, str(value)


def is_function_key(name: str, value: str) -> bool:
    return (name.startswith("algorithm.") or name == "kl.estimator") and "." in value


def is_trusted(path: str) -> bool:
    """Returns whether a dotted path is in this package, or in a file of the working directory."""
    first, *rest = path.split(".")
    if first == PACKAGE_NAME:
        return True
    try:
        spec = find_spec(first)  # of a first name it imports nothing
    except ValueError:  # as of __main__
        return False
    if spec is None:
        return True  # there is no such module: refused as that, later
    if spec.origin is not None:
        return is_users_file(Path(spec.origin))  # built-in ones have a word there, and no file
    return all(
        is_users_file(place)
        for place in resolve_in_namespace([*(spec.submodule_search_locations or [])], rest)
    )


def resolve_in_namespace(folders: Sequence[str], names: Sequence[str]) -> list[Path]:
    """Follows names through folders without an __init__.py, which form one namespace package."""
    found = [Path(folder) for folder in folders]
    for name in names:
        files = [folder / f"{name}.py" for folder in found if (folder / f"{name}.py").is_file()]
        deeper = files or [folder / name for folder in found if (folder / name).is_dir()]
        if not deeper:
            break
        found = deeper
    return found


def is_users_file(place: Path) -> bool:
    """Returns whether a file is in the working directory, and not in the folder in question.

    The packages of an environment may be there too; they are not the user's.
    """
    place, here = place.expanduser().resolve(), Path.cwd()
    if not place.exists() or not place.is_relative_to(here) or "site-packages" in place.parts:
        return False
    return OVERRIDE_SOURCE.folder is None or not place.is_relative_to(
        OVERRIDE_SOURCE.folder.resolve()
    )
