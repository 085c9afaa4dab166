"""What a sweep's jobs are compared by: which metrics, and which way each of them is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from grpo.config.check import check_metric
from grpo.errors import ConfigError
from grpo.runs.files import read_summary
from grpo.runs.jsonl import read_lines

DIRECTIONS = ("maximize", "minimize")


def check_directions(objectives: Any, direction: str) -> None:
    """Refuses what a sweeper's keys of these names can't be.

    Args:
        objectives: several with their directions, or nothing: then it is the config's one.
        direction: of the config's one.
    """
    if not isinstance(objectives, Mapping | None):
        raise ConfigError(
            f"hydra.sweeper.objectives={objectives}: write it with its direction, "
            f"{{{objectives}: maximize}}."
        )
    for metric, way in (objectives or {}).items():
        if way not in DIRECTIONS:
            raise ConfigError(f"hydra.sweeper.objectives.{metric}={way}: maximize or minimize.")
    if direction not in DIRECTIONS:
        raise ConfigError(f"hydra.sweeper.direction={direction}: maximize or minimize.")
    if objectives and direction != DIRECTIONS[0]:
        raise ConfigError(
            f"hydra.sweeper.direction={direction}: is of `objective`; hydra.sweeper.objectives has "
            f"a direction for each."
        )


def resolve_objectives(
    objectives: Mapping[str, str] | None, direction: str, configs: Sequence[DictConfig]
) -> dict[str, str]:
    """Each metric that counts, and which way.

    Args:
        configs: of jobs of the sweep.

    Raises:
        ConfigError: no run logs one, or each job has another.
    """
    own = sorted({str(config.objective) for config in configs})
    if objectives is None and len(own) > 1:
        raise ConfigError(
            f"objective={','.join(own)}: a sweep's jobs are compared by one; several at once are "
            f"hydra.sweeper.objectives={{{own[0]}: maximize, {own[1]}: maximize}}."
        )
    found = dict(objectives or {str(configs[0].objective): direction})
    some_pull = [config for config in configs if config.kl_weight] or configs
    for metric, config in product(found, some_pull):
        check_metric(config, metric, "hydra.sweeper.objectives")
    return found


def read_final_values(job: Path, objectives: Sequence[str]) -> tuple[list[float], str]:
    """The value of each metric where it was logged last, and the name of one that has none there.

    A value that was no number is null in the files, and none; an earlier one doesn't count.
    """
    last: dict[str, Any] = {}
    for line in read_lines(job / "metrics.jsonl"):
        last |= line
    last |= (read_summary(job) or {}).get("last_evaluation") or {}
    missing = next((metric for metric in objectives if last.get(metric) is None), "")
    return [float(last[m]) for m in objectives if last.get(m) is not None], missing
