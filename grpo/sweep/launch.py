"""Runs a sweep's jobs through Hydra, after their configs were composed and checked."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from grpo.config.check import check_config, check_training
from grpo.config.overrides import parse_key, quote_value
from grpo.config.schema import remove_hydra
from grpo.config.trust import check_code
from grpo.errors import ConfigError, RunError
from grpo.runs.stop import stoppable
from grpo.sweep.folder import read_job_state

log = logging.getLogger(__name__)

SWEEP_ONLY_KEYS = ("sweep_dir", "resume")  # they say where a sweep is, not what it runs


def combine_overrides(params: Mapping[str, object], arguments: Sequence[str]) -> list[str]:
    """Returns a sweep's overrides: those of its file, then the command line's.

    Raises:
        ConfigError: the command line sets `resume`.
    """
    for argument in arguments:
        if parse_key(argument) == "resume":
            raise ConfigError(
                f"{argument}: a sweep resumes its own jobs; use grpo -m sweep_dir=FOLDER."
            )
    whole = [*(f"{key}={value}" for key, value in params.items()), *arguments]
    return [argument for argument in whole if parse_key(argument) not in SWEEP_ONLY_KEYS]


def prepare_launch(context: HydraContext, task: TaskFunction, config: DictConfig) -> Launch:
    """Sets up Hydra's launcher to run jobs of this task for a sweeper."""
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=context, task_function=task, config=config
    )
    return Launch(context, config, launcher)


@contextmanager
def waiting_for_all_jobs() -> Iterator[None]:
    """Within it, submitit waits for all jobs of a batch, not only until the first one dies."""
    if "hydra_plugins.hydra_submitit_launcher.submitit_launcher" not in sys.modules:
        yield
        return
    import submitit

    class TolerantJob:
        """A submitit job that returns [None] if it died: its results are in its folder."""

        def __init__(self, job: submitit.Job[Any]) -> None:
            self.job = job

        def results(self) -> list[Any]:
            try:
                return self.job.results()
            except Exception as error:  # noqa: BLE001 - the job's own error or its loss
                log.warning("a job was lost (%s: %s)", type(error).__name__, str(error)[:500])
                return [None]

    submitted = submitit.AutoExecutor.map_array

    def map_array(self: submitit.AutoExecutor, *arguments: Any) -> list[Any]:
        return [TolerantJob(job) for job in submitted(self, *arguments)]

    submitit.AutoExecutor.map_array = map_array  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        submitit.AutoExecutor.map_array = submitted  # type: ignore[method-assign]


@dataclass(frozen=True)
class Launch:
    """What a sweeper gets from Hydra to run jobs."""

    context: HydraContext
    config: DictConfig
    launcher: Launcher

    @property
    def folder(self) -> Path:
        return Path(str(self.config.hydra.sweep.dir)).expanduser()

    @property
    def config_dir(self) -> str | None:
        """The --config-dir, if one was given."""
        sources = self.config.hydra.runtime.config_sources
        folders = [str(source.path) for source in sources if source.provider == "command-line"]
        return folders[0] if folders else None

    @property
    def arguments(self) -> list[str]:
        """The overrides of the command line, Hydra's and the experiment's.

        Interpolations stay unresolved, so that no value of the environment is stored.
        """
        overrides = OmegaConf.to_container(self.config.hydra.overrides, resolve=False)
        assert isinstance(overrides, dict)
        whole = (*overrides["hydra"], *overrides["task"])
        return [override for override in whole if parse_key(override) not in SWEEP_ONLY_KEYS]

    def compose(self, job: Sequence[str]) -> DictConfig:
        """Composes and checks the config of a job.

        Raises:
            ConfigError: it is wrong. If it can't be composed, Hydra's own error is raised.
        """
        config = remove_hydra(self.compose_whole(job))
        try:
            check_code(config)
            check_config(config)
            check_training(config)
        except ConfigError as error:
            raise ConfigError(
                f"{error} (the job {' '.join(job)})", key=error.key, value=error.value,
                choices=error.choices, nearest=error.nearest,
            ) from error  # fmt: skip
        return config

    def compose_whole(self, job: Sequence[str]) -> DictConfig:
        """Composes a job's config with Hydra's section, and doesn't check it."""
        return self.context.config_loader.load_sweep_config(self.config, list(job))

    def run(self, jobs: Sequence[tuple[int, Sequence[str]]]) -> None:
        """Runs jobs in the folders of their numbers, each from its checkpoint if it has one.

        Results are only in these folders, so a job may run, and die, on any machine.

        Raises:
            SystemExit: 130, after Ctrl-C, once the running jobs are saved.
            RunError: no job could be started.
        """
        folder = quote_value(self.folder.absolute())
        location = ("resume=auto", f"sweep_dir={folder}", f"hydra.sweep.dir={folder}")
        batch = [[*job, *location, f"hydra.sweep.subdir={number}"] for number, job in jobs]
        if not batch:
            return
        try:
            with stoppable(self.folder), waiting_for_all_jobs():
                self.launcher.launch(batch, initial_job_idx=jobs[0][0])
        except Exception as error:  # each launcher raises its own error for a lost worker
            left = [job for job in jobs if read_job_state(self.folder, job[0]).status == "none"]
            if len(left) == len(jobs):
                raise RunError(f"hydra/launcher: {type(error).__name__}: {error}") from error
            log.warning("a worker was lost (%s: %s)", type(error).__name__, error)
            self.run(left)


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep would run."""

    launch: Launch
    kind: str  # grid or search
    total: int  # jobs or trials
    left: int  # of them
    examples: list[list[str]]  # overrides of jobs: of a grid all of them, of a search its corners
    objectives: dict[str, str]
    space: dict[str, str] = field(default_factory=dict)  # of a search: what each key may be
