"""Reads the jobs of sweeps from their folders, also those of unfinished sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from grpo.errors import ConfigError
from grpo.report.run.read import resolve_config
from grpo.runs.files import FINISHED
from grpo.runs.jsonl import find_last_values, read_lines
from grpo.runs.resume import read_yaml
from grpo.sweep.folder import StudyFile, read_job_state, require_record

NOT_SETTING_KEYS = ("seed", "sweep", "name")  # overrides that are no part of a setting


@dataclass(frozen=True)
class Job:
    """One job of a sweep, as far as it has come."""

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
    answer_count: int = 0  # right or wrong answers that the objective is a share of; 0: no share

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get(self.objective) is not None]

    @property
    def value(self) -> float | None:
        """The objective at the job's end; None if it hasn't finished or the value isn't finite."""
        logged = [line[self.objective] for line in self.lines if self.objective in line]
        if self.status != FINISHED or not logged or logged[-1] is None:
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
    space: dict[str, Any] = field(default_factory=dict)  # of a search; as in StudyFile

    @property
    def objective(self) -> str:
        """The objective that settings are ranked by."""
        return next(iter(self.objectives))

    @property
    def minimized(self) -> bool:
        return self.objectives[self.objective] == "minimize"

    @property
    def keys(self) -> list[str]:
        """The keys in which jobs differ, without the seed."""
        keys = [key for key in self.jobs[0].values if key not in NOT_SETTING_KEYS]
        return [key for key in keys if len({str(job.values[key]) for job in self.jobs}) > 1]

    @property
    def keys_and_seed(self) -> list[str]:
        """The keys in which jobs differ, with the seed if they differ in it."""
        seeds = {str(job.values.get("seed")) for job in self.jobs}
        return [*self.keys, *(["seed"] if len(seeds) > 1 else [])]

    def get_setting_values(self, job: Job) -> tuple[Any, ...]:
        """Returns the values that all jobs of this job's setting share."""
        return tuple(job.values[key] for key in self.keys)


def read_sweeps(folders: Sequence[Path]) -> Sweep:
    """Reads the jobs and objectives of one or several sweeps.

    The objectives are those in study.json or sweep.json, or else the config's objective.

    Raises:
        ConfigError: a folder holds no sweep, no job has begun, or the objectives differ.
    """
    found: list[tuple[str, int, Path, list[str]]] = []
    records = {folder: require_record(folder) for folder in folders}
    for folder, record in records.items():
        name = folder.name if len(folders) > 1 else ""
        found += [(name, n, folder, job) for n, job in enumerate(record.jobs) if job]
    given = [parse_override_values(overrides) for _, _, _, overrides in found]
    keys = list(dict.fromkeys(key for values in given for key in values))
    studies = {folder: StudyFile.read(folder) for folder in folders}
    recorded = {
        folder: study.objectives if study else records[folder].objectives
        for folder, study in studies.items()
    }
    jobs = [
        read_job(name, number, folder, overrides, values, keys, next(iter(recorded[folder]), ""))
        for (name, number, folder, overrides), values in zip(found, given, strict=True)
    ]
    if not jobs:
        raise ConfigError(f"{folders[0]}: no job of this sweep has begun.")
    known = next((job.objective for job in jobs if job.objective), "eval/sampled_accuracy")
    jobs = [job if job.objective else replace(job, objective=known) for job in jobs]
    objectives = {job.objective for job in jobs}
    if len(objectives) > 1:
        names = ", ".join(sorted(objectives))
        raise ConfigError(f"these sweeps have different objectives: {names}.")
    directions = [each for each in recorded.values() if each] or [{jobs[0].objective: "maximize"}]
    if any(each != directions[0] for each in directions):
        raise ConfigError(f"these sweeps' objectives differ: {' and '.join(map(str, directions))}.")
    spaces = [study.space for study in studies.values() if study]
    return Sweep(list(folders), jobs, directions[0], spaces[0] if spaces else {})


def parse_override_values(overrides: Sequence[str]) -> dict[str, Any]:
    """Returns the value of each override by its key or group."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return {override.key_or_group: override.value() for override in parsed}


def read_job(
    sweep: str,
    number: int,
    folder: Path,
    overrides: list[str],
    given_values: dict[str, Any],
    keys: list[str],
    search_metric: str,
) -> Job:
    """Reads a job; search_metric: the first objective that its sweep recorded, or ""."""
    state = read_job_state(folder, number)
    config = resolve_config(read_yaml(state.folder / ".hydra" / "config.yaml") or {})
    hydra = read_yaml(state.folder / ".hydra" / "hydra.yaml") or {"hydra": {"runtime": {}}}
    choices = hydra["hydra"]["runtime"].get("choices", {})
    metric = (state.summary.get("objective") or {}).get("name") or config.get("objective")
    objective = str(search_metric or metric or "")  # a job that hasn't begun has none
    return Job(
        sweep=sweep,
        number=number,
        folder=state.folder,
        status=state.status,
        reason=state.reason,
        overrides=overrides,
        values={
            key: normalize_number(
                given_values[key] if key in given_values else choices.get(key, look_up(config, key))
            )
            for key in keys
        },
        objective=objective,
        lines=read_lines(state.folder / "metrics.jsonl"),
        seconds=float(state.summary.get("wall_seconds") or 0.0),
        answer_count=int((state.summary.get("trials") or {}).get(objective, 0)),
    )


def normalize_number(value: Any) -> Any:
    """Converts a whole float to an int, as 1.0 and 1 are the same setting."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def look_up(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config
