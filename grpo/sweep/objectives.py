"""The metrics that a sweep's jobs are compared by, and the direction in which each is better."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from grpo.config.check import check_metric
from grpo.errors import ConfigError
from grpo.runs.files import FINISHED, read_summary
from grpo.runs.jsonl import read_lines
from grpo.sweep.folder import JobState

DIRECTIONS = ("maximize", "minimize")


def check_directions(objectives: Any, direction: str) -> None:
    """Raises ConfigError if a sweeper's key of one of these names has a wrong value.

    Args:
        objectives: metrics with their directions; None: config.objective.
        direction: of config.objective.
    """
    if not isinstance(objectives, Mapping | None):
        raise ConfigError(
            f"hydra.sweeper.objectives={objectives}: write it with its direction, "
            f"{{{objectives}: maximize}}.",
            key="hydra.sweeper.objectives",
            value=objectives,
        )
    for metric, way in (objectives or {}).items():
        if way not in DIRECTIONS:
            raise ConfigError(f"hydra.sweeper.objectives.{metric}={way}: use maximize or minimize.")
    if direction not in DIRECTIONS:
        raise ConfigError(
            f"hydra.sweeper.direction={direction}: use maximize or minimize.",
            key="hydra.sweeper.direction",
            value=direction,
        )
    if objectives and direction != DIRECTIONS[0]:
        raise ConfigError(
            f"hydra.sweeper.direction={direction}: applies to `objective` alone; "
            f"hydra.sweeper.objectives has a direction for each.",
            key="hydra.sweeper.direction",
            value=direction,
        )


def resolve_objectives(
    objectives: Mapping[str, str] | None, direction: str, configs: Sequence[DictConfig]
) -> dict[str, str]:
    """Returns each metric that jobs are compared by, with its direction.

    Args:
        configs: of jobs of the sweep.

    Raises:
        ConfigError: no run logs a metric, or jobs have different objectives.
    """
    metrics = sorted({str(config.objective) for config in configs})
    if objectives is None and len(metrics) > 1:
        raise ConfigError(
            f"objective={','.join(metrics)}: a sweep's jobs are compared by one; several "
            f"are hydra.sweeper.objectives={{{metrics[0]}: maximize, {metrics[1]}: maximize}}.",
            key="objective",
            value=",".join(metrics),
        )
    found = dict(objectives or {str(configs[0].objective): direction})
    with_kl = [config for config in configs if config.kl_weight] or configs  # others lack kl/mean
    for metric, config in product(found, with_kl):
        check_metric(config, metric, "hydra.sweeper.objectives")
    return found


def read_job_values(job: JobState, metrics: Iterable[str]) -> dict[str, float | None]:
    """Returns the last value of each metric; None for one without, and all if it isn't finished."""
    last = read_last_values(job.folder) if job.status == FINISHED else {}
    return {m: None if last.get(m) is None else float(last[m]) for m in metrics}


def read_last_values(job: Path) -> dict[str, Any]:
    last: dict[str, Any] = {}
    for line in read_lines(job / "metrics.jsonl"):
        last |= line
    return last | ((read_summary(job) or {}).get("last_evaluation") or {})


def read_final_values(job: Path, objectives: Sequence[str]) -> tuple[list[float], str]:
    """Returns the last logged value of each metric, and the name of one without a value, or "".

    A last value that is not finite is null in the files and counts as missing.
    """
    last = read_last_values(job)
    missing = next((metric for metric in objectives if last.get(metric) is None), "")
    return [float(last[m]) for m in objectives if last.get(m) is not None], missing
