"""A search's study, made or found again."""

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
    """The metrics that count, and which way.

    Raises:
        ConfigError: no run logs one, or a pruner has nothing to go by.
    """
    objectives = resolve_objectives(options.objectives, options.direction, configs)
    if options.pruner != "none":
        (metric,) = objectives
        if not metric.startswith("eval/"):
            raise ConfigError(
                f"hydra.sweeper.pruner={options.pruner}: goes by evaluations; {metric} is not one."
            )
        if not configs[0].eval.every:
            raise ConfigError(
                f"hydra.sweeper.pruner={options.pruner} eval.every=0: goes by evaluations during "
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
    """The study, made or found again, and the name that it knows this folder by.

    Args:
        storage_asked: as it was given, so that what lies in the environment stays there.

    Raises:
        ConfigError: its storage can't be had, or it is a study of something else.
    """
    with exclusive(folder), storage_errors(options.storage):
        there = StudyFile.read(folder)
        usual = there.study_name if there else f"{folder.absolute().parent.name}/{folder.name}"
        name = options.study_name or usual
        storage = open_storage(options.storage, folder)
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=[Direction[way.upper()] for way in objectives.values()],
            pruner=options.make_pruner(),
            load_if_exists=True,
        )
        check_same_study(study, objectives, space, fixed)
        place = there.folder if there else uuid.uuid4().hex[:8]
        pruner = (options.pruner, dict(options.pruner_options))
        file = StudyFile(
            unresolved_storage, name, objectives, *pruner, place, serialize_space(space)
        )
        file.write(folder)
    return study, place


def check_same_study(
    study: optuna.Study,
    objectives: dict[str, str],
    space: Space,
    fixed: Sequence[str],
) -> None:
    """Refuses to go on with a study of another space, objective or experiment."""
    wanted = {"space": serialize_space(space), "fixed": sorted(fixed), "objectives": objectives}
    there = study.user_attrs
    for what, value in wanted.items():
        if what not in there:
            study.set_user_attr(what, value)
        elif there[what] != value:
            raise ConfigError(
                f"{study.study_name}: this study's {what} was {there[what]}, and is {value} now; "
                f"give another sweep_dir or hydra.sweeper.study_name."
            )
    minimized = [d == Direction.MINIMIZE for d in study.directions]
    if minimized != [d == "minimize" for d in objectives.values()]:
        raise ConfigError(f"{study.study_name}: this study's objectives went another way.")


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """One process at a time, the others wait; the system lets go of it when a process dies."""
    descriptor = os.open(folder / "sweep.lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
