"""Hydra's callback, which checks a config before Hydra makes a folder for it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from grpo.cli.exits import refuse
from grpo.cli.outcome import CURRENT
from grpo.config.check import check_config
from grpo.config.schema import remove_hydra
from grpo.config.secrets import refuse_secrets
from grpo.config.trust import check_code
from grpo.config.validation import check_could_write, check_writable
from grpo.errors import ConfigError
from grpo.runs.folder import check_run_folder


def check_hydra(config: DictConfig) -> None:
    """Refuses settings of Hydra's that hide runs from later commands or change paths."""
    settings = config.hydra
    if settings.output_subdir != ".hydra":
        given = "null" if settings.output_subdir is None else settings.output_subdir
        raise ConfigError(
            f"hydra.output_subdir={given}: must be .hydra, where resume, eval and reports read a "
            f"run's config.",
            key="hydra.output_subdir",
            value=given,
        )
    if settings.job.chdir:
        raise ConfigError(
            "hydra.job.chdir=true: relative paths (model.path, dataset.path, resume) are relative "
            "to where you start, so a run stays there; leave it out.",
            key="hydra.job.chdir",
            value="true",
        )


class CheckBeforeRun(Callback):
    """Checks a config before a run or sweep, so that a refused one leaves no folder."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        with callback_errors():
            check_sweep(config)
            if CURRENT.command == "check":
                from grpo.commands import check  # torch comes with it

                CURRENT.content = {"check": check.check_sweep(config)}
                raise SystemExit(0)
        CURRENT.command, CURRENT.folder = "sweep", Path(config.hydra.sweep.dir)

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with callback_errors():
            if CURRENT.command == "check":
                check_run(config, check_could_write)
                from grpo.commands import check  # torch comes with it

                CURRENT.content = {"check": check.check_run(config)}
                raise SystemExit(0)
            check_run(config, check_writable)
        CURRENT.folder = Path(config.hydra.run.dir)


@contextmanager
def callback_errors() -> Iterator[None]:
    """Ends the process at any error: after one in a callback, Hydra only warns and continues."""
    try:
        yield
    except ConfigError as error:
        refuse(error)
    except OmegaConfBaseException as error:  # an interpolation to what is not there
        key = getattr(error, "full_key", None)
        refuse(ConfigError(f"{f'{key}: ' if key else ''}{str(error).splitlines()[0]}"))
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(1) from error


def check_sweep(config: DictConfig) -> None:
    """Raises ConfigError if Hydra should not sweep as given."""
    refuse_secrets(config)
    check_hydra(config)
    if any(override.startswith("hydra.sweep.subdir=") for override in config.hydra.overrides.hydra):
        raise ConfigError(
            "hydra.sweep.subdir: a sweep's jobs lie in folders of their numbers, by which it goes "
            "on and is reported; leave it out.",
            key="hydra.sweep.subdir",
        )
    if config.hydra.sweeper._target_.endswith(".BasicSweeper"):
        raise ConfigError(
            "hydra/sweeper=basic: has no report and no resume after a kill; leave it out for "
            "grid, which takes the same overrides.",
            key="hydra/sweeper",
            value="basic",
        )


def check_run(config: DictConfig, check_folder: Callable[[Path, str], None]) -> None:
    """Raises ConfigError if a config, or the folder that it names, is not fit for a run.

    Args:
        check_folder: refuses a folder that can't be written; gets the folder and its key.
    """
    refuse_secrets(config)
    check_hydra(config)
    experiment = remove_hydra(config)
    check_code(experiment)
    check_config(experiment)
    folder = Path(config.hydra.run.dir)
    check_run_folder(folder, config.resume, config.model, config.adapter)
    check_folder(folder, "hydra.run.dir")
