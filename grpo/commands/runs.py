"""`grpo runs [FOLDER]`: lists runs, evaluations and sweeps, each with a command to continue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.commands.describe import summarize_evaluation, summarize_run, summarize_sweep
from grpo.config.overrides import parse_key
from grpo.dashboard.outputs import find_outputs
from grpo.errors import ConfigError

USAGE = "grpo runs [FOLDER]"
DEFAULT_FOLDER = "outputs"


def runs(arguments: Sequence[str]) -> dict[str, Any]:
    """Lists runs, evaluations and sweeps, newest first.

    Raises:
        ConfigError: there is no such folder.
    """
    if len(arguments) > 1 or any(word.startswith("-") for word in arguments):
        raise ConfigError(f"{USAGE}: {' '.join(arguments)} is not a folder.")
    root = Path(arguments[0] if arguments else DEFAULT_FOLDER).expanduser()
    if arguments and not root.is_dir():
        raise ConfigError(f"{root}: there is no such folder.", key="FOLDER", value=str(root))
    found = find_outputs(root)
    content = {
        "folder": str(root),
        "runs": [summarize_run(run) for run in found.runs],
        "evaluations": [summarize_evaluation(evaluation) for evaluation in found.evaluations],
        "sweeps": [summarize_sweep(sweep) for sweep in found.sweeps],
        "unreadable": found.errors,
    }
    print(format_listing(content), flush=True)
    return {"outputs": content}


def format_listing(content: Mapping[str, Any]) -> str:
    """Formats a block of lines for each sweep, run and evaluation."""
    blocks = [
        *map(format_sweep, content["sweeps"]),
        *map(format_run, content["runs"]),
        *map(format_evaluation, content["evaluations"]),
        *content["unreadable"],
    ]
    return "\n".join(blocks) or f"{content['folder']}: holds no run, evaluation or sweep yet."


def format_run(run: Mapping[str, Any]) -> str:
    parts = [f"run {run['folder']}: {run['status']}"]
    parts.append(f"step {run['steps']} of {run['total_steps']}")
    objective, last = run["objective"] or {}, run["last_evaluation"] or {}
    value = last.get(objective.get("name"))
    if value is not None:
        parts.append(f"{objective['name']} {value:.4g}")
    return "\n".join([", ".join(parts), *format_overrides(run), *format_next(run)])


def format_sweep(sweep: Mapping[str, Any]) -> str:
    counts = ", ".join(
        f"{count} {'to run' if status == 'none' else status}"
        for status, count in sweep["jobs_by_status"].items()
    )
    lines = [f"{'sweep' if sweep['kind'] == 'grid' else 'search'} {sweep['folder']}: {counts}"]
    if best := sweep["best"]:
        values = " ".join(f"{metric} {value:.4g}" for metric, value in best["objective"].items())
        lines.append(f"  best single job: {best['job']}, {values}: {' '.join(best['overrides'])}")
        if sweep["report"]:
            lines.append(f"  best setting over all seeds: in {sweep['report']}")
    return "\n".join([*lines, *format_next(sweep)])


def format_evaluation(evaluation: Mapping[str, Any]) -> str:
    names = ("eval/accuracy", "eval/sampled_accuracy", "eval/pass_at_k")
    metrics = evaluation["metrics"]
    values = [f"{name} {metrics[name]:.4g}" for name in names if metrics.get(name) is not None]
    return f"evaluation {evaluation['folder']} of {evaluation['checkpoint']}: {', '.join(values)}"


def format_overrides(run: Mapping[str, Any]) -> list[str]:
    shown = [override for override in run["overrides"] if parse_key(override) != "resume"]
    return [f"  {' '.join(shown)}"] if shown else []


def format_next(described: Mapping[str, Any]) -> list[str]:
    return [f"  next: {described['next'][0]}"] if described["next"] else []
