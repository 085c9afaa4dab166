"""Runs that are already there: their folders, and the overrides they were started with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from grpo.errors import ConfigError
from grpo.models.find import holds_model, local_folder

NOT_THE_EXPERIMENT = ("resume", "hydra.run.dir", "checkpoint")  # where a run goes, not what it is


def with_past_overrides(job: str, overrides: Sequence[str]) -> list[str]:
    """The overrides with those of the run that is resumed or evaluated put before them.

    So `grpo resume=DIR` needs no repetition of how DIR was started, and what is given now wins.
    """
    given = [o for o in overrides if not o.startswith("-")]
    flags = [o for o in overrides if o.startswith("-")]
    if "-m" in flags or "--multirun" in flags:
        return list(overrides)
    if job == "eval":
        folder = value_of("checkpoint", given)
        run = run_of(Path(folder)) if folder else None
        return list(overrides) if run is None else [*flags, *merged(past_overrides(run), given)]
    resume = value_of("resume", given)
    if resume in (None, "null", ""):
        return list(overrides)
    if resume == "auto":
        if value_of("hydra.run.dir", given):
            return list(overrides)
        run = newest_unfinished(given)
        return list(overrides) if run is None else [*overrides, f"hydra.run.dir={run}"]
    run = Path(resume)
    if not run.is_dir():
        raise ConfigError(f"resume={resume}: there is no such folder.")
    run = run_of(run) or run
    if not has_checkpoint(run):
        raise ConfigError(f"resume={resume}: no checkpoint in it, so nothing to go on from.")
    return [*flags, *merged(past_overrides(run), given), f"hydra.run.dir={run}"]


def value_of(key: str, overrides: Sequence[str]) -> str | None:
    """The last value given to a key."""
    values = [o.partition("=")[2] for o in overrides if o.partition("=")[0] == key]
    return values[-1].strip("'\"") if values else None


def merged(past: Sequence[str], given: Sequence[str]) -> list[str]:
    """Past overrides that are not given anew, then the new ones."""
    renewed = {o.partition("=")[0].lstrip("+~") for o in given} | set(NOT_THE_EXPERIMENT)
    return [o for o in past if o.partition("=")[0].lstrip("+~") not in renewed] + list(given)


def run_of(folder: Path) -> Path | None:
    """The run that a folder is, or is a checkpoint or model of."""
    for candidate in (folder, *folder.absolute().parents[:3]):
        if (candidate / ".hydra" / "overrides.yaml").is_file():
            return candidate
    return None


def past_overrides(run: Path) -> list[str]:
    file = run / ".hydra" / "overrides.yaml"
    return list(yaml.safe_load(file.read_text()) or []) if file.is_file() else []


def has_checkpoint(run: Path) -> bool:
    return newest_step(run) is not None


def newest_unfinished(overrides: Sequence[str]) -> Path | None:
    """The newest run under outputs/ of these same overrides that has a checkpoint and no end."""
    wanted = experiment(overrides)
    for run in sorted(Path("outputs").glob("[0-9]*/*"), reverse=True):
        if (
            has_checkpoint(run)
            and not is_finished(run)
            and experiment(past_overrides(run)) == wanted
        ):
            return run
    return None


def experiment(overrides: Sequence[str]) -> list[str]:
    return sorted(o for o in overrides if o.partition("=")[0] not in NOT_THE_EXPERIMENT)


def is_finished(run: Path) -> bool:
    try:
        return bool(json.loads((run / "summary.json").read_text())["status"] == "finished")
    except (OSError, ValueError, KeyError):
        return False


def newest_step(run: Path) -> Path | None:
    """A run's newest checkpoint, by number."""
    found = [path for path in (run / "checkpoints").glob("step_*") if path.name[5:].isdigit()]
    return max(found, key=lambda path: int(path.name[5:]), default=None)


def model_of_checkpoint(folder: str) -> Path:
    """The model's folder in a run, in one of its checkpoints, or the folder itself.

    Raises:
        ConfigError: there is no model there.
    """
    path = Path(folder).expanduser()
    newest = newest_step(path)
    for candidate in (path / "model", *([newest / "model"] if newest else [])):
        if holds_model(candidate):
            return candidate
    return local_folder("checkpoint", folder)


def check_folder(run: Path, resume: str | None, model: Mapping[str, Any]) -> None:
    """Refuses to write over another run, and to go on with another model.

    Raises:
        ConfigError: saying which it would be.
    """
    if resume is None:
        if (run / "metrics.jsonl").exists():
            raise ConfigError(
                f"hydra.run.dir={run}: holds a run already; resume={run} goes on with it."
            )
        return
    newest = newest_step(run)
    if newest is None:
        return
    try:
        saved = json.loads((newest / "config.json").read_text())["model"]
    except (OSError, ValueError, KeyError):
        return  # a broken checkpoint; loading it says so, and takes the one before
    for key in ("id", "path", "packaged"):
        if saved[key] != model[key]:
            raise ConfigError(
                f"resume={resume}: this run trains model={saved['name']} "
                f"(model.{key}={saved[key]}), not model={model['name']} ({model[key]})."
            )


def forget_unstarted(run: Path) -> None:
    """Removes a run folder that holds nothing but what Hydra wrote before the run was refused."""
    if {path.name for path in run.iterdir()} <= {".hydra", "train.log", "eval.log"}:
        shutil.rmtree(run)
