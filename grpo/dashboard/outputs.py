"""What there is to see in a folder of outputs, newest first."""

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
    """A run, as its summary says."""

    folder: Path
    status: str
    summary: Mapping[str, Any]
    overrides: list[str]


@dataclass(frozen=True)
class SweepFolder:
    """A sweep and what has become of its jobs."""

    folder: Path
    jobs: list[JobState]

    @property
    def is_search(self) -> bool:
        return (self.folder / STUDY).is_file()


@dataclass(frozen=True)
class EvaluationFolder:
    """What `grpo eval` found."""

    folder: Path
    result: Mapping[str, Any]  # evaluation.json
    overrides: list[str]


@dataclass(frozen=True)
class Outputs:
    runs: list[RunFolder]
    evaluations: list[EvaluationFolder]
    sweeps: list[SweepFolder]
    errors: list[str]  # why a sweep can't be read


def find_outputs(root: Path) -> Outputs:
    """Runs, evaluations and sweeps at any depth; the jobs of a sweep are the sweep's."""
    runs, evaluations, sweeps, broken = [], [], [], []
    for name, inside, files in os.walk(root):
        folder = Path(name)
        if RECORD in files:
            try:
                sweeps.append(SweepFolder(folder, list(read_job_states(folder))))
            except ConfigError as error:
                broken.append(str(error))  # and it hides no other
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
                broken.append(str(error))
            if found is not None:
                evaluations.append(EvaluationFolder(folder, found, overrides))
            elif summary is not None:
                runs.append(RunFolder(folder, infer_status(folder, summary), summary, overrides))
        else:
            continue
        inside.clear()  # what is within it is its own
    evaluations.sort(key=lambda own: (own.folder / EVALUATION).stat().st_mtime, reverse=True)
    runs.sort(key=lambda run: str(run.summary.get("started")), reverse=True)
    sweeps.sort(key=lambda sweep: (sweep.folder / RECORD).stat().st_mtime, reverse=True)
    return Outputs(runs, evaluations, sweeps, broken)
