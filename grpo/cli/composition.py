"""Makes Hydra compose a config once, and faster; Hydra does it twice, first to read hydra.mode.

A composition takes about as long as importing Hydra, and every refusal waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import yaml
from hydra._internal import defaults_list
from hydra._internal.hydra import Hydra
from hydra.core.utils import configure_log
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import DictConfig, _utils

MULTIRUN_FLAGS = {"-m", "--multirun"}
make_python_loader, read_mode_by_composing = _utils.get_yaml_loader, Hydra.get_mode
compose_anew, map_choices = Hydra.compose_config, defaults_list._create_interpolation_map


class Composition:
    """Keeps the config that was composed to read hydra.mode, so that it can be used."""

    def __init__(self, run_mode: RunMode) -> None:
        self.run_mode = run_mode
        self.overrides: list[str] = []
        self.config: DictConfig | None = None

    def read_mode(self, hydra: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        """Replaces `Hydra.get_mode`; raises the errors that composing raises."""
        try:
            self.config = compose_anew(hydra, config_name, overrides, self.run_mode)
        except ConfigCompositionException as error:
            if "Ambiguous value" not in str(error):
                raise
            # A sweep may use several choices for a group.
            return read_mode_by_composing(hydra, config_name, overrides)
        self.overrides = list(overrides)
        return self.config.hydra.mode

    def compose(
        self,
        hydra: Hydra,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        with_log_configuration: bool = False,
        **options: Any,
    ) -> DictConfig:
        """Replaces `Hydra.compose_config`; returns the kept config once, if it fits."""
        config, added = self.config, overrides[len(self.overrides) :]
        self.config = None
        same = run_mode == self.run_mode and overrides[: len(self.overrides)] == self.overrides
        if config is None or not same or any(not o.startswith("hydra.mode=") for o in added):
            return compose_anew(
                hydra, config_name, overrides, run_mode, with_log_configuration, **options
            )
        for override in added:  # Hydra itself adds the mode to the command line
            config.hydra.mode = RunMode[override.partition("=")[2]]
            config.hydra.overrides.hydra.append(override)
        if with_log_configuration:
            configure_log(config.hydra.hydra_logging, config.hydra.verbose)
        return config


@contextmanager
def composed_once(overrides: Sequence[str]) -> Iterator[None]:
    """Within it, Hydra composes the config of this command line once."""
    composition = Composition(RunMode.MULTIRUN if MULTIRUN_FLAGS & set(overrides) else RunMode.RUN)

    def get_mode(hydra: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        return composition.read_mode(hydra, config_name, overrides)

    def compose_config(hydra: Hydra, *arguments: Any, **options: Any) -> DictConfig:
        return composition.compose(hydra, *arguments, **options)

    with (
        replaced(Hydra, "get_mode", get_mode),
        replaced(Hydra, "compose_config", compose_config),
        replaced(_utils, "get_yaml_loader", find_yaml_loader),
        replaced(defaults_list, "_create_interpolation_map", map_choices_if_needed),
    ):
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within it, an attribute of `owner` has this value."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def map_choices_if_needed(overrides: Any, defaults: list[Any], self_added: bool) -> Any:
    """Maps groups to choices, to resolve a `${…}` in a list of defaults; None if there is none.

    Hydra makes this map for every file.
    """
    if any(default.is_interpolation() for default in defaults):
        return map_choices(overrides, defaults, self_added)
    return None


@cache
def find_yaml_loader() -> Any:
    """Returns OmegaConf's loader, with PyYAML's parser in C if that is installed."""
    with replaced(yaml, "SafeLoader", getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        return make_python_loader()


def find_composed(error: BaseException) -> DictConfig | None:
    """Returns the config to which an unknown key was applied; None if the error is another one."""
    if not isinstance(error, ConfigCompositionException):
        return None
    node = getattr(error.__cause__, "parent_node", None)
    root = None if node is None else node._get_root()
    return root if isinstance(root, DictConfig) else None
