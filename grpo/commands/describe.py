"""Runs, evaluations and sweeps as JSON objects, from what lies in their folders.

docs/reference/json.md describes each field. Sizes are small: curves and texts stay in the files.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.dashboard.outputs import EVALUATION, EvaluationFolder, RunFolder, SweepFolder
from grpo.errors import ConfigError
from grpo.report.run.read import read_run
from grpo.runs.files import ENDED, FINISHED, RUNNING, read_summary
from grpo.runs.folder import find_newest_checkpoint
from grpo.runs.resume import read_recorded_overrides
from grpo.sweep.folder import (
    RECORD,
    JobState,
    StudyFile,
    infer_status,
    read_job_states,
    read_json_file,
    require_record,
)
from grpo.sweep.objectives import read_final_values

SUMMARY_KEYS = (
    "steps", "total_steps", "objective", "first_evaluation", "last_evaluation", "wall_seconds",
    "started", "device", "error",
)  # fmt: skip


def describe_run(folder: Path) -> dict[str, Any]:
    """A run with its diagnoses; empty where none has begun."""
    summary = read_summary(folder)
    if summary is None:
        return {}
    status = infer_status(folder, summary)
    found = summarize_run(RunFolder(folder, status, summary, read_recorded_overrides(folder)))
    try:
        diagnoses = read_run(folder).diagnoses
    except ConfigError:  # it has logged nothing yet
        diagnoses = []
    found["diagnoses"] = [
        {"name": own.name, "title": own.title, "evidence": own.evidence, "cause": own.cause,
         "remedy": own.remedy}
        for own in diagnoses
    ]  # fmt: skip
    return found


def summarize_run(run: RunFolder) -> dict[str, Any]:
    saved = find_newest_checkpoint(run.folder)
    report = run.folder / "report.html"
    return {
        "folder": str(run.folder),
        "status": run.status,
        "overrides": run.overrides,
        **{key: run.summary.get(key) for key in SUMMARY_KEYS},
        "checkpoint_step": int(saved.name[5:]) if saved else None,
        "model": str(run.folder / "checkpoints/latest/model") if saved else None,
        "report": str(report) if report.is_file() else None,
        "next": suggest_after_run(run.folder, run.status, run.overrides, saved is not None),
    }


def suggest_after_run(
    folder: Path, status: str, overrides: Sequence[str], saved: bool
) -> list[str]:
    """Commands that go on from here, the likeliest first."""
    if status == RUNNING:
        return []
    if status in ENDED:
        return [format_command("eval", f"checkpoint={folder}", "eval.samples=16")]
    if saved:
        return [format_command(f"resume={folder}")]
    return [format_command(*overrides)]


def format_command(*arguments: str) -> str:
    return shlex.join(["grpo", *arguments])


def describe_evaluation(folder: Path) -> dict[str, Any]:
    """What `grpo eval` found; empty where it found nothing."""
    result = read_json_file(folder / EVALUATION, dict, "what it found isn't known")
    if result is None:
        return {}
    return summarize_evaluation(EvaluationFolder(folder, result, read_recorded_overrides(folder)))


def summarize_evaluation(evaluation: EvaluationFolder) -> dict[str, Any]:
    result = evaluation.result
    return {
        "folder": str(evaluation.folder),
        "checkpoint": result.get("checkpoint"),
        "overrides": evaluation.overrides,
        "prompts": result.get("prompts"),
        "metrics": {key: value for key, value in result.items() if key.startswith("eval/")},
        "figures": result.get("figures"),
    }


def summarize_sweep(sweep: SweepFolder) -> dict[str, Any]:
    """A sweep by its counts and its best job."""
    objectives = read_objectives(sweep.folder)
    record = require_record(sweep.folder)
    values = {job.number: read_values(job, objectives) for job in sweep.jobs}
    metric = next(iter(objectives), None)
    reached = {
        number: value
        for number, own in values.items()
        if metric and (value := own[metric]) is not None
    }
    best = None
    if reached:
        pick = min if objectives[str(metric)] == "minimize" else max
        number = pick(reached, key=lambda n: reached[n])
        best = {
            "job": number, "objective": values[number], "overrides": record.jobs[number],
            "folder": str(sweep.folder / str(number)),
        }  # fmt: skip
    left = [job for job in sweep.jobs if not job.ended]
    report = sweep.folder / "report.html"
    return {
        "folder": str(sweep.folder),
        "kind": "search" if sweep.is_search else "grid",
        "status": "unfinished" if left else FINISHED,
        "jobs_by_status": dict(Counter(job.status for job in sweep.jobs)),
        "objectives": objectives,
        "best": best,
        "report": str(report) if report.is_file() else None,
        "next": suggest_after_sweep(sweep.folder, bool(left)),
    }


def suggest_after_sweep(folder: Path, unfinished: bool) -> list[str]:
    go_on = [format_command("-m", f"sweep_dir={folder}")] if unfinished else []
    best = (folder / "experiment/best.yaml").is_file()
    return [
        *go_on,
        *([format_command("--config-dir", str(folder), "experiment=best")] if best else []),
        format_command("report", str(folder)),
    ]


def read_objectives(sweep: Path) -> dict[str, str]:
    """Each metric that a sweep's jobs are compared by, and its direction."""
    study = StudyFile.read(sweep)
    return dict(study.objectives if study else require_record(sweep).objectives)


def read_values(job: JobState, objectives: Mapping[str, str]) -> dict[str, float | None]:
    """What a job came to; null where it hasn't ended well."""
    if job.status != FINISHED:
        return dict.fromkeys(objectives)
    return {
        metric: next(iter(read_final_values(job.folder, [metric])[0]), None)
        for metric in objectives
    }


def describe_sweep(folder: Path) -> dict[str, Any]:
    """A sweep with its jobs, its ranking and what the data says; empty where none has begun."""
    if not (folder / RECORD).is_file():
        return {}
    sweep = SweepFolder(folder, list(read_job_states(folder)))
    objectives, record = read_objectives(folder), require_record(folder)
    found = summarize_sweep(sweep)
    found["jobs"] = [
        {
            "number": job.number, "folder": str(job.folder), "status": job.status,
            "overrides": record.jobs[job.number], "objective": read_values(job, objectives),
            "error": job.reason or None,
        }
        for job in sweep.jobs
    ]  # fmt: skip
    return {**found, **describe_ranking(folder)}


def describe_ranking(folder: Path) -> dict[str, Any]:
    """Settings, best first: jobs that differ in the seed alone are one."""
    from grpo.report.sweep.importance import compute_importances  # these bring SciPy with them
    from grpo.report.sweep.ranking import rank_settings
    from grpo.report.sweep.read import read_sweeps

    sweep = read_sweeps([folder])
    ranking = rank_settings(sweep)
    settings = [
        {
            "values": dict(zip(ranking.keys, own.values, strict=True)),
            "mean": own.mean,
            "low": own.interval.low if own.interval else None,
            "high": own.interval.high if own.interval else None,
            "seeds": sorted(own.by_seed),
            "jobs": [job.number for job in own.jobs],
            "tied_for_best": own in ranking.ties,
            "differs_from_best": bool(n and ranking.significant[n - 1]),
        }
        for n, own in enumerate(ranking.settings)
    ]
    return {
        "settings": settings,
        "importance": compute_importances(sweep),
        "conclusion": ranking.conclusion,
    }
