"""Builds what a run's trackers know of it, and the sinks that record it."""

from __future__ import annotations

import functools
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from grpo.config.binding import bind
from grpo.config.secrets import resolve_without_secrets
from grpo.runs.progress import Progress
from grpo.runs.stop import is_sweep_job
from grpo.runs.summary import find_git_commit
from grpo.tracking import RunInfo


def make_run_name(cfg: DictConfig, choices: Mapping[str, Any]) -> str:
    """Returns the default name of a run: that of its experiment, or MODEL-DATASET."""
    experiment = choices.get("experiment")
    if isinstance(experiment, str) and experiment != "none":
        return experiment
    return f"{cfg.model.name}-{choices['dataset']}"


def build_evaluation_info(cfg: DictConfig, folder: Path) -> RunInfo:
    return RunInfo(
        id=uuid.uuid4().hex[:8],
        name=f"eval-{cfg.name or make_run_name(cfg, HydraConfig.get().runtime.choices)}"
        f"-{make_folder_title(folder)}",
        folder=folder,
        config=resolve_without_secrets(cfg),
        group=None,
        first_step=0,
        logged_step=-1,
        total_steps=0,
        commit=find_git_commit(),
        job_type="eval",
    )


def bind_sinks(cfg: DictConfig) -> list[functools.partial[Any]]:
    """Binds the options of each tracker; each result makes a sink from `info`."""
    return [bind(node, f"tracking.{name}") for name, node in cfg.tracking.items()]


def make_folder_title(folder: Path) -> str:
    """Returns the name of a run's folder, after its parent's if that is a day."""
    day = folder.parent.name
    return f"{day}-{folder.name}" if re.fullmatch(r"\d+-\d+-\d+", day) else folder.name


def build_run_info(cfg: DictConfig, folder: Path, start: Progress, steps: int) -> RunInfo:
    hydra = HydraConfig.get()
    name = cfg.name or make_run_name(cfg, hydra.runtime.choices)
    if is_sweep_job() or cfg.name is None:
        name = f"{name}-{make_folder_title(folder)}"
    return RunInfo(
        id=start.run_id,
        name=name,
        folder=folder,
        config=resolve_without_secrets(cfg),
        group=Path(hydra.sweep.dir).name if is_sweep_job() else None,
        first_step=start.step,
        logged_step=start.step if start.unlogged is None else start.step - 1,
        total_steps=steps,
        commit=find_git_commit(),
    )
