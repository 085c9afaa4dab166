"""Creates the study of a search, or opens it again."""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import optuna
from omegaconf import DictConfig
from optuna.study import StudyDirection as Direction

from grpo.errors import ConfigError
from grpo.sweep.folder import (
    StudyFile,
)
from grpo.sweep.objectives import resolve_objectives
from grpo.sweep.space import Space
from grpo.sweep.study import (
    SearchOptions,
    open_storage,
    serialize_space,
    storage_errors,
)


def check_objectives(options: SearchOptions, configs: Sequence[DictConfig]) -> dict[str, str]:
    """Returns the metrics that trials are compared by, with their directions.

    Raises:
        ConfigError: no run logs a metric, or training has no evaluations for a pruner.
    """
    objectives = resolve_objectives(options.objectives, options.direction, configs)
    if options.pruner != "none":
        (metric,) = objectives
        if not metric.startswith("eval/"):
            raise ConfigError(
                f"hydra.sweeper.pruner={options.pruner}: prunes by evaluations, not by {metric}.",
                key="hydra.sweeper.pruner",
                value=options.pruner,
            )
        if not configs[0].eval.every:
            raise ConfigError(
                f"hydra.sweeper.pruner={options.pruner} eval.every=0: prunes by evaluations during "
                f"training; set eval.every."
            )
    return objectives


def open_study(
    options: SearchOptions,
    unresolved_storage: str | None,
    objectives: dict[str, str],
    space: Space,
    fixed: Sequence[str],
    folder: Path,
) -> tuple[optuna.Study, str]:
    """Creates or opens the study; returns it and its id of this folder.

    Args:
        unresolved_storage: as it was given, so that no value of the environment is stored.

    Raises:
        ConfigError: the storage can't be opened, or the study is of another search.
    """
    with exclusive(folder), storage_errors(options.storage):
        stored = StudyFile.read(folder)
        default = stored.study_name if stored else f"{folder.absolute().parent.name}/{folder.name}"
        name = options.study_name or default
        storage = open_storage(options.storage, folder)
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=[Direction[way.upper()] for way in objectives.values()],
            pruner=options.make_pruner(),
            load_if_exists=True,
        )
        check_same_study(study, objectives, space, fixed)
        folder_id = stored.folder if stored else uuid.uuid4().hex[:8]
        pruner = (options.pruner, dict(options.pruner_options))
        file = StudyFile(
            unresolved_storage, name, objectives, *pruner, folder_id, serialize_space(space)
        )
        file.write(folder)
    return study, folder_id


def check_same_study(
    study: optuna.Study,
    objectives: dict[str, str],
    space: Space,
    fixed: Sequence[str],
) -> None:
    """Raises ConfigError if the study has another space, objective or experiment."""
    wanted = {"space": serialize_space(space), "fixed": sorted(fixed), "objectives": objectives}
    stored = study.user_attrs
    for what, value in wanted.items():
        if what not in stored:
            study.set_user_attr(what, value)
        elif stored[what] != value:
            raise ConfigError(
                f"{study.study_name}: this study's {what} was {stored[what]}, and is {value} now; "
                f"give another sweep_dir or hydra.sweeper.study_name."
            )
    minimized = [d == Direction.MINIMIZE for d in study.directions]
    if minimized != [d == "minimize" for d in objectives.values()]:
        raise ConfigError(f"{study.study_name}: this study's objectives have other directions.")


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Within it, other processes wait; the system releases the lock when this process dies."""
    descriptor = os.open(folder / "sweep.lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
