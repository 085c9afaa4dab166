"""Describes runs, evaluations and sweeps as JSON objects, from the files in their folders.

docs/reference/json.md describes each field. Curves and texts stay in the files.
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
    Record,
    StudyFile,
    infer_status,
    read_job_states,
    read_json_file,
    require_record,
)
from grpo.sweep.objectives import read_job_values

SUMMARY_KEYS = (
    "steps", "total_steps", "objective", "first_evaluation", "last_evaluation", "wall_seconds",
    "started", "device", "error",
)  # fmt: skip


def describe_run(folder: Path) -> dict[str, Any]:
    """Describes a run with its diagnoses; returns {} if the folder holds none."""
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
        {"name": d.name, "title": d.title, "evidence": d.evidence, "cause": d.cause,
         "remedy": d.remedy}
        for d in diagnoses
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
    """Returns commands that continue from here, the likeliest first."""
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
    """Describes the result of `grpo eval`; returns {} if there is none."""
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
    """Describes a sweep by its counts and its best job."""
    objectives = read_objectives(sweep.folder)
    values = {job.number: read_job_values(job, objectives) for job in sweep.jobs}
    return describe_progress(sweep, require_record(sweep.folder), objectives, values)


def describe_progress(
    sweep: SweepFolder,
    record: Record,
    objectives: Mapping[str, str],
    values: Mapping[int, Mapping[str, float | None]],
) -> dict[str, Any]:
    """Describes a sweep by its counts and its best job. values: of each job, by its number."""
    metric = next(iter(objectives), None)
    reached = {
        number: value
        for number, of_job in values.items()
        if metric and (value := of_job[metric]) is not None
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
    """Reads the metrics by which a sweep's jobs are compared, each with its direction."""
    study = StudyFile.read(sweep)
    return dict(study.objectives if study else require_record(sweep).objectives)


def describe_sweep(folder: Path) -> dict[str, Any]:
    """Describes a sweep with its jobs, ranking and conclusion; returns {} if there is none."""
    if not (folder / RECORD).is_file():
        return {}
    sweep = SweepFolder(folder, list(read_job_states(folder)))
    objectives, record = read_objectives(folder), require_record(folder)
    values = {job.number: read_job_values(job, objectives) for job in sweep.jobs}
    found = describe_progress(sweep, record, objectives, values)
    found["jobs"] = [
        {
            "number": job.number, "folder": str(job.folder), "status": job.status,
            "overrides": record.jobs[job.number], "objective": values[job.number],
            "error": job.reason or None,
        }
        for job in sweep.jobs
    ]  # fmt: skip
    return {**found, **describe_ranking(folder)}


def describe_ranking(folder: Path) -> dict[str, Any]:
    """Ranks the settings, best first; jobs that differ only in the seed are one setting."""
    from grpo.report.sweep.importance import compute_importances  # these bring SciPy with them
    from grpo.report.sweep.ranking import rank_settings
    from grpo.report.sweep.read import read_sweeps

    sweep = read_sweeps([folder])
    ranking = rank_settings(sweep)
    settings = [
        {
            "values": dict(zip(ranking.keys, setting.values, strict=True)),
            "mean": setting.mean,
            "low": setting.interval.low if setting.interval else None,
            "high": setting.interval.high if setting.interval else None,
            "seeds": sorted(setting.by_seed),
            "jobs": [job.number for job in setting.jobs],
            "tied_for_best": setting in ranking.ties,
            "differs_from_best": bool(n and ranking.significant[n - 1]),
        }
        for n, setting in enumerate(ranking.settings)
    ]
    return {
        "settings": settings,
        "importance": compute_importances(sweep),
        "conclusion": ranking.conclusion,
    }
