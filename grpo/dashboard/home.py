"""The home page: a list of runs, sweeps and evaluations, with links to their pages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from grpo.dashboard.outputs import EvaluationFolder, Outputs, RunFolder
from grpo.report.html import Page
from grpo.runs.files import RUNNING
from grpo.sweep.folder import count_by_status
from grpo.tracking.console import format_duration

SECONDS_BETWEEN_LOADS = 10  # while something runs


def render_home(
    outputs: Outputs, root: Path, studies: Mapping[Path, int], unreadable: Mapping[Path, str]
) -> str:
    """Returns the page as HTML.

    Args:
        studies: a sweep's folder -> its study's number in optuna-dashboard.
        unreadable: a sweep's folder -> why its study can't be read.
    """
    page = Page(f"grpo: {root.absolute().name}")
    if any(status == RUNNING for status in list_statuses(outputs)):
        page.seconds_to_reload = SECONDS_BETWEEN_LOADS

    def format_place(folder: Path) -> str:
        return str(folder.relative_to(root))

    return page.render(
        "home.html",
        name=root.absolute().name,
        summary=summarize_outputs(outputs),
        has_studies=bool(studies),
        errors=outputs.errors,
        sweeps=[
            {
                "place": format_place(sweep.folder),
                "counts": count_by_status(job.status for job in sweep.jobs),
                "error": unreadable.get(sweep.folder),
                "study": studies.get(sweep.folder),
                "jobs": [
                    (job.number, format_place(job.folder))
                    for job in sweep.jobs
                    if job.status != "none"
                ],
            }
            for sweep in outputs.sweeps
        ],
        runs=[
            {"place": format_place(run.folder), "cells": list_run_cells(run)}
            for run in outputs.runs
        ],
        evaluations=[
            [format_place(evaluation.folder), *list_evaluation_cells(evaluation)]
            for evaluation in outputs.evaluations
        ],
    )


def list_statuses(outputs: Outputs) -> Iterable[str]:
    yield from (run.status for run in outputs.runs)
    yield from (job.status for sweep in outputs.sweeps for job in sweep.jobs)


def summarize_outputs(outputs: Outputs) -> str:
    count = sum(status == RUNNING for status in list_statuses(outputs))
    runs, sweeps = len(outputs.runs), len(outputs.sweeps)
    parts = [f"{runs} run{'' if runs == 1 else 's'}", f"{sweeps} sweep{'' if sweeps == 1 else 's'}"]
    return f"{', '.join(parts)}; {f'{count} running now' if count else 'nothing runs just now'}."


def list_run_cells(run: RunFolder) -> list[str]:
    first, last = run.summary.get("first_evaluation"), run.summary.get("last_evaluation")
    gains = [format_gain(first, last, f"eval/{key}") for key in ("sampled_accuracy", "accuracy")]
    steps = f"{run.summary.get('steps', 0)} of {run.summary.get('total_steps', '?')}"
    time = format_duration(run.summary.get("wall_seconds") or 0)
    return [run.status, steps, *gains, time, " ".join(run.overrides)]


def list_evaluation_cells(evaluation: EvaluationFolder) -> list[str]:
    shares = [
        format_gain(None, evaluation.result, f"eval/{key}")
        for key in ("sampled_accuracy", "accuracy", "pass_at_k")
    ]
    checkpoint, prompts = (str(evaluation.result[key]) for key in ("checkpoint", "prompts"))
    return [checkpoint, prompts, *shares, " ".join(evaluation.overrides)]


def format_gain(first: Mapping[str, Any] | None, last: Mapping[str, Any] | None, key: str) -> str:
    values = [evaluation.get(key) for evaluation in (first, last) if evaluation]
    shares = [f"{value:.1%}" for value in values if value is not None]
    return " \u2192 ".join(dict.fromkeys(shares))
