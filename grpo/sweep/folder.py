"""A sweep's folder: its jobs, and the status of each."""

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
STUDY = "study.json"  # only of a search

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """How a sweep was started, and its jobs in order of their numbers; stored in sweep.json."""

    arguments: list[str]
    config_dir: str | None
    jobs: list[list[str]]  # the overrides of each; empty: another folder runs this trial
    objectives: dict[str, str] = field(default_factory=dict)  # of a grid; as in StudyFile

    def write(self, folder: Path) -> None:
        write_json(folder / RECORD, asdict(self))


def read_record(folder: Path) -> Record | None:
    """Reads sweep.json; returns None if the folder holds no sweep.

    Raises:
        ConfigError: sweep.json can't be read.
    """

    def parse(content: dict[str, Any]) -> Record:
        arguments, config_dir, jobs = (content[k] for k in ("arguments", "config_dir", "jobs"))
        return Record(arguments, config_dir, jobs, content.get("objectives") or {})

    return read_json_file(folder / RECORD, parse, "its jobs aren't known")


@dataclass(frozen=True)
class StudyFile:
    """What jobs and reports need to know of a search; stored in study.json."""

    storage: str | None
    study_name: str
    objectives: dict[str, str]  # metric -> maximize or minimize
    pruner: str
    pruner_options: dict[str, Any]
    folder: str  # an id of the folder, which stays the same if the folder is moved
    space: dict[str, Any] = field(default_factory=dict)  # Optuna's distribution of each key

    def write(self, folder: Path) -> None:
        write_json(folder / STUDY, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> StudyFile | None:
        """Reads study.json; returns None if the folder holds no search.

        Raises:
            ConfigError: study.json can't be read.
        """
        return read_json_file(
            folder / STUDY, lambda content: cls(**content), "its study isn't known"
        )


def read_json_file(file: Path, parse: Callable[[dict[str, Any]], T], consequence: str) -> T | None:
    """Reads and parses a JSON file; returns None if there is no such file.

    Args:
        consequence: what isn't known without it, for the message.

    Raises:
        ConfigError: it is not JSON, or `parse` fails on its content.
    """
    if not file.is_file():
        return None
    try:
        return parse(json.loads(file.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: can't be read, so {consequence}.") from error


@dataclass(frozen=True)
class JobState:
    """The state of a job, as its folder shows it."""

    number: int
    folder: Path
    status: str  # finished, pruned, failed, interrupted, killed, running, or none: not begun
    reason: str  # why it failed or was killed
    summary: Mapping[str, Any]  # empty if there is none

    @property
    def ended(self) -> bool:
        """Whether nothing of it is left to do."""
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
    """Returns a run's status: "killed" if its summary says "running" but no process runs it."""
    if not summary:
        return "none"
    status = str(summary.get("status"))
    return "killed" if status == RUNNING and not is_locked(run) else status


@dataclass(frozen=True)
class SweepResult:
    """The jobs of a sweep at its end."""

    folder: Path
    jobs: Sequence[JobState]
    unsuccessful: Sequence[JobState]  # those that did not end well


def number_jobs(
    record: Record | None, jobs: Sequence[Sequence[str]], sweep: Path
) -> list[list[str]]:
    """Returns all jobs in order of their numbers: recorded jobs keep theirs, new ones follow.

    Raises:
        ConfigError: a job occurs twice, or the folder holds another sweep.
    """
    wanted = {identify_job(job): list(job) for job in jobs}
    if len(wanted) < len(jobs):
        twice = next(
            job for n, job in enumerate(jobs) if identify_job(job) in map(identify_job, jobs[:n])
        )
        raise ConfigError(f"{' '.join(twice)}: twice in this sweep; leave one out.")
    recorded = [] if record is None else record.jobs
    unwanted = [job for job in recorded if identify_job(job) not in wanted]
    if unwanted:
        raise ConfigError(
            f"sweep_dir={sweep}: holds another sweep, with the job {' '.join(unwanted[0])}; keep "
            f"its values to resume it, or give another sweep_dir.",
            key="sweep_dir",
            value=sweep,
        )
    known = {identify_job(job) for job in recorded}
    return [*recorded, *(job for identity, job in wanted.items() if identity not in known)]


def identify_job(overrides: Sequence[str]) -> tuple[str, ...]:
    """Returns a job's identity: its overrides, in whatever order they were written."""
    return tuple(sorted(overrides))


def require_record(sweep: Path) -> Record:
    """Reads sweep.json; raises ConfigError if the folder holds no sweep."""
    record = read_record(sweep)
    if record is None:
        raise ConfigError(f"{sweep}: holds no sweep ({RECORD} is not there).")
    return record


def read_job_states(sweep: Path) -> Iterator[JobState]:
    """Yields the state of every job in the sweep's record.

    Raises:
        ConfigError: the folder holds no sweep.
    """
    for number, job in enumerate(require_record(sweep).jobs):
        if job:
            yield read_job_state(sweep, number)


def count_by_status(statuses: Iterable[str]) -> str:
    """Formats the number of jobs of each status, as `3 finished, 1 to run`."""
    words = {"none": "to run"}
    counts = Counter(words.get(status, status) for status in statuses)
    return ", ".join(f"{count} {status}" for status, count in counts.items())
