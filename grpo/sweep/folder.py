"""A sweep's folder: which jobs it has, and how far each of them has come."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from grpo.errors import ConfigError
from grpo.runs.files import ENDED, RUNNING, read_summary, write_json
from grpo.runs.folder import find_newest_checkpoint
from grpo.runs.lock import is_locked

RECORD = "sweep.json"
STUDY = "study.json"  # there too where the sweep is a search

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """How a sweep was started, and its jobs in order of their numbers; kept in sweep.json."""

    arguments: list[str]
    config_dir: str | None
    jobs: list[list[str]]  # the overrides of each; none: a shared study's trial run elsewhere
    objectives: dict[str, str] = field(default_factory=dict)  # of a grid: as StudyFile's

    def write(self, folder: Path) -> None:
        write_json(folder / RECORD, asdict(self))


def read_record(folder: Path) -> Record | None:
    """None where the folder holds no sweep.

    Raises:
        ConfigError: what is there can't be read.
    """

    def record(content: dict[str, Any]) -> Record:
        arguments, own_configs, jobs = (content[k] for k in ("arguments", "config_dir", "jobs"))
        return Record(arguments, own_configs, jobs, content.get("objectives") or {})

    return read_json_file(folder / RECORD, record, "its jobs aren't known")


@dataclass(frozen=True)
class StudyFile:
    """What a search's jobs and its readers must know of it; kept in study.json."""

    storage: str | None
    study_name: str
    objectives: dict[str, str]
    pruner: str
    pruner_options: dict[str, Any]
    folder: str  # a name for the folder that it keeps wherever it is moved
    space: dict[str, Any] = field(default_factory=dict)  # Optuna's distribution of each key

    def write(self, folder: Path) -> None:
        write_json(folder / STUDY, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> StudyFile | None:
        """None where the folder holds no search.

        Raises:
            ConfigError: what is there can't be read.
        """
        return read_json_file(
            folder / STUDY, lambda content: cls(**content), "its study isn't known"
        )


def read_json_file(file: Path, parse: Callable[[dict[str, Any]], T], consequence: str) -> T | None:
    """What a JSON file holds; None where it is not there.

    Args:
        without: what follows from not having it, for the message.

    Raises:
        ConfigError: it can't be read, or holds something else.
    """
    if not file.is_file():
        return None
    try:
        return parse(json.loads(file.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: can't be read, so {consequence}.") from error


@dataclass(frozen=True)
class JobState:
    """What has become of a job, as its folder says."""

    number: int
    folder: Path
    status: str  # finished, pruned, failed, interrupted, killed, running, or none: not begun
    reason: str  # of a failure
    summary: Mapping[str, Any]  # empty where there is none

    @property
    def ended(self) -> bool:
        """Nothing of it is left to do."""
        return self.status in ENDED

    def __str__(self) -> str:
        return f"job {self.number}: {self.reason or self.status}"


def read_job_state(sweep: Path, number: int) -> JobState:
    folder = sweep / str(number)
    summary = read_summary(folder) or {}
    status = infer_status(folder, summary)
    reason = str(summary.get("error") or "")
    if status == "killed":
        step = find_newest_checkpoint(folder)
        reason = f"ended from outside; {f'saved at {step.name}' if step else 'nothing saved'}"
    return JobState(number, folder, status, reason, summary)


def infer_status(run: Path, summary: Mapping[str, Any]) -> str:
    """What has become of a run; a killed one still says that it runs."""
    if not summary:
        return "none"
    status = str(summary.get("status"))
    return "killed" if status == RUNNING and not is_locked(run) else status


@dataclass(frozen=True)
class SweepResult:
    """What a sweep came to."""

    folder: Path
    jobs: Sequence[JobState]
    unsuccessful: Sequence[JobState]  # those of them that did not end well


def number_jobs(
    record: Record | None, jobs: Sequence[Sequence[str]], sweep: Path
) -> list[list[str]]:
    """All jobs in order of their numbers: those that are there keep theirs, new ones follow.

    Raises:
        ConfigError: what is there is another sweep.
    """
    wanted = {identify_job(job): list(job) for job in jobs}
    if len(wanted) < len(jobs):
        twice = next(
            job for n, job in enumerate(jobs) if identify_job(job) in map(identify_job, jobs[:n])
        )
        raise ConfigError(f"{' '.join(twice)}: twice in this sweep; leave one out.")
    past = [] if record is None else record.jobs
    gone = [job for job in past if identify_job(job) not in wanted]
    if gone:
        raise ConfigError(
            f"sweep_dir={sweep}: holds another sweep, with the job {' '.join(gone[0])}; give more "
            f"values to go on with that one, or another sweep_dir."
        )
    there = {identify_job(job) for job in past}
    return [*past, *(job for own, job in wanted.items() if own not in there)]


def identify_job(overrides: Sequence[str]) -> tuple[str, ...]:
    """What tells jobs apart, however they were written."""
    return tuple(sorted(overrides))


def require_record(sweep: Path) -> Record:
    """Raises ConfigError where the folder holds no sweep."""
    record = read_record(sweep)
    if record is None:
        raise ConfigError(f"{sweep}: holds no sweep ({RECORD} is not there).")
    return record


def read_job_states(sweep: Path) -> Iterator[JobState]:
    """Every job that the sweep's record names.

    Raises:
        ConfigError: the folder holds no sweep.
    """
    for number, job in enumerate(require_record(sweep).jobs):
        if job:
            yield read_job_state(sweep, number)


def count_by_status(statuses: Iterable[str]) -> str:
    """`3 finished, 1 to run`"""
    words = {"none": "to run"}
    counts = Counter(words.get(status, status) for status in statuses)
    return ", ".join(f"{count} {status}" for status, count in counts.items())
