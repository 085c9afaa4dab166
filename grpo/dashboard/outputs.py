"""Finds the runs, evaluations and sweeps in a folder of outputs, newest first."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.errors import ConfigError
from grpo.report.run.read import is_run
from grpo.runs.files import read_summary
from grpo.runs.resume import read_yaml
from grpo.sweep.folder import RECORD, STUDY, JobState, infer_status, read_job_states, read_json_file

EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class RunFolder:
    """A run's folder and summary."""

    folder: Path
    status: str
    summary: Mapping[str, Any]
    overrides: list[str]


@dataclass(frozen=True)
class SweepFolder:
    """A sweep's folder and the states of its jobs."""

    folder: Path
    jobs: list[JobState]

    @property
    def is_search(self) -> bool:
        return (self.folder / STUDY).is_file()


@dataclass(frozen=True)
class EvaluationFolder:
    """A result of `grpo eval`."""

    folder: Path
    result: Mapping[str, Any]  # evaluation.json
    overrides: list[str]


@dataclass(frozen=True)
class Outputs:
    runs: list[RunFolder]
    evaluations: list[EvaluationFolder]
    sweeps: list[SweepFolder]
    errors: list[str]  # of folders that can't be read


def find_outputs(root: Path) -> Outputs:
    """Finds runs, evaluations and sweeps at any depth; a sweep's jobs are not listed as runs."""
    runs, evaluations, sweeps, errors = [], [], [], []
    for name, subfolders, files in os.walk(root):
        folder = Path(name)
        if RECORD in files:
            try:
                sweeps.append(SweepFolder(folder, list(read_job_states(folder))))
            except ConfigError as error:
                errors.append(str(error))  # the other folders are still shown
        elif is_run(folder):
            summary = read_summary(folder)
            if summary is None and EVALUATION not in files:
                continue
            found = None
            overrides: list[str] = []
            try:
                overrides = list(read_yaml(folder / ".hydra" / "overrides.yaml") or [])
                found = read_json_file(folder / EVALUATION, dict, "what it found isn't known")
            except ConfigError as error:
                errors.append(str(error))
            if found is not None:
                evaluations.append(EvaluationFolder(folder, found, overrides))
            elif summary is not None:
                runs.append(RunFolder(folder, infer_status(folder, summary), summary, overrides))
        else:
            continue
        subfolders.clear()  # don't search its subfolders
    evaluations.sort(key=lambda found: (found.folder / EVALUATION).stat().st_mtime, reverse=True)
    runs.sort(key=lambda run: str(run.summary.get("started")), reverse=True)
    sweeps.sort(key=lambda sweep: (sweep.folder / RECORD).stat().st_mtime, reverse=True)
    return Outputs(runs, evaluations, sweeps, errors)
