"""The jobs of sweeps, read from their folders; a half-finished sweep is read like a whole one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from grpo.errors import ConfigError
from grpo.report.run.read import resolve_config
from grpo.runs.jsonl import find_last_values, read_lines
from grpo.runs.resume import read_yaml
from grpo.sweep.folder import StudyFile, read_job_state, require_record

NOT_SETTING_KEYS = ("seed", "sweep", "name")  # overrides that don't make a setting


@dataclass(frozen=True)
class Job:
    """One run of a sweep, as far as it came."""

    sweep: str
    number: int
    folder: Path
    status: str
    reason: str
    overrides: list[str]
    values: dict[str, Any]  # of every key that any job overrides
    objective: str
    lines: list[dict[str, Any]]  # of metrics.jsonl
    seconds: float
    answer_count: int = (
        0  # of how many right or wrong answers the objective is the share; 0: of none
    )

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get(self.objective) is not None]

    @property
    def value(self) -> float | None:
        """The objective at its end; None where it hasn't come to it, or is no number there."""
        logged = [line[self.objective] for line in self.lines if self.objective in line]
        if self.status != "finished" or not logged or logged[-1] is None:
            return None
        return float(logged[-1])

    @property
    def last_values(self) -> dict[str, float]:
        """The last value of each metric."""
        return find_last_values(self.lines)

    @property
    def tokens(self) -> float:
        """Completion tokens trained on."""
        return sum(
            (line.get("perf/completion_tokens_per_second") or 0) * (line.get("time/step") or 0)
            for line in self.lines
        )


@dataclass(frozen=True)
class Sweep:
    """All jobs of one or several sweeps."""

    folders: list[Path]
    jobs: list[Job]
    objectives: dict[str, str]  # each metric, and whether to maximize or minimize it
    space: dict[str, Any] = field(default_factory=dict)  # of a search: as StudyFile's

    @property
    def objective(self) -> str:
        """The one that settings are ranked by."""
        return next(iter(self.objectives))

    @property
    def minimized(self) -> bool:
        return self.objectives[self.objective] == "minimize"

    @property
    def keys(self) -> list[str]:
        """Those in which jobs differ, the seed aside."""
        keys = [key for key in self.jobs[0].values if key not in NOT_SETTING_KEYS]
        return [key for key in keys if len({str(job.values[key]) for job in self.jobs}) > 1]

    @property
    def keys_and_seed(self) -> list[str]:
        """The same, and the seed where jobs differ in it."""
        seeds = {str(job.values.get("seed")) for job in self.jobs}
        return [*self.keys, *(["seed"] if len(seeds) > 1 else [])]

    def get_setting_values(self, job: Job) -> tuple[Any, ...]:
        """What jobs have in common that differ in the seed alone."""
        return tuple(job.values[key] for key in self.keys)


def read_sweeps(folders: Sequence[Path]) -> Sweep:
    """The objectives are those of the search, of a grid the config's.

    Raises:
        ConfigError: one is no sweep, none has a job, or their objectives differ.
    """
    found: list[tuple[str, int, Path, list[str]]] = []
    records = {folder: require_record(folder) for folder in folders}
    for folder, record in records.items():
        name = folder.name if len(folders) > 1 else ""
        found += [(name, n, folder, own) for n, own in enumerate(record.jobs) if own]
    given = [parse_override_values(overrides) for _, _, _, overrides in found]
    keys = list(dict.fromkeys(key for one in given for key in one))
    studies = {folder: StudyFile.read(folder) for folder in folders}
    searched = {
        folder: own.objectives if own else records[folder].objectives
        for folder, own in studies.items()
    }
    jobs = [
        read_job(name, number, folder, overrides, own, keys, next(iter(searched[folder]), ""))
        for (name, number, folder, overrides), own in zip(found, given, strict=True)
    ]
    if not jobs:
        raise ConfigError(f"{folders[0]}: no job of this sweep has begun.")
    known = next((job.objective for job in jobs if job.objective), "eval/sampled_accuracy")
    jobs = [job if job.objective else replace(job, objective=known) for job in jobs]
    objectives = {job.objective for job in jobs}
    if len(objectives) > 1:
        raise ConfigError(f"these sweeps have several objectives: {', '.join(sorted(objectives))}.")
    directions = [own for own in searched.values() if own] or [{jobs[0].objective: "maximize"}]
    if any(own != directions[0] for own in directions):
        raise ConfigError(f"these sweeps' objectives differ: {' and '.join(map(str, directions))}.")
    spaces = [own.space for own in studies.values() if own]
    return Sweep(list(folders), jobs, directions[0], spaces[0] if spaces else {})


def parse_override_values(overrides: Sequence[str]) -> dict[str, Any]:
    """The value that each override gives."""
    given = OverridesParser.create().parse_overrides(list(overrides))
    return {one.key_or_group: one.value() for one in given}


def read_job(
    sweep: str,
    number: int,
    folder: Path,
    overrides: list[str],
    given_values: dict[str, Any],
    keys: list[str],
    search_metric: str,
) -> Job:
    """searched: the metric that a search went by, if it is a job of one."""
    where = read_job_state(folder, number)
    config = resolve_config(read_yaml(where.folder / ".hydra" / "config.yaml") or {})
    hydra = read_yaml(where.folder / ".hydra" / "hydra.yaml") or {"hydra": {"runtime": {}}}
    choices = hydra["hydra"]["runtime"].get("choices", {})
    metric = (where.summary.get("objective") or {}).get("name") or config.get("objective")
    objective = str(search_metric or metric or "")  # one that hasn't begun has none of its own
    return Job(
        sweep=sweep,
        number=number,
        folder=where.folder,
        status=where.status,
        reason=where.reason,
        overrides=overrides,
        values={
            key: normalize_number(
                given_values[key] if key in given_values else choices.get(key, look_up(config, key))
            )
            for key in keys
        },
        objective=objective,
        lines=read_lines(where.folder / "metrics.jsonl"),
        seconds=float(where.summary.get("wall_seconds") or 0.0),
        answer_count=int((where.summary.get("trials") or {}).get(objective, 0)),
    )


def normalize_number(value: Any) -> Any:
    """A whole float as an int: 1.0 and 1 are one setting, whoever wrote it how."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def look_up(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config
