"""Resuming a run: finds it and reads its overrides, which come before the new ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from grpo.config.overrides import (
    LOCATION_KEYS,
    has_config_dir,
    parse_key,
    quote_value,
)
from grpo.errors import ConfigError
from grpo.runs.files import is_finished, read_summary
from grpo.runs.folder import find_newest_checkpoint, find_run
from grpo.runs.lock import is_locked, locked


def format_run_dir(run: Path) -> str:
    """Formats the override that sets a run's folder, quoted where its name needs it."""
    return f"hydra.run.dir={quote_value(run)}"


def find_resumable_run(resume: str) -> Path:
    """Returns the run's folder that `resume` names.

    Raises:
        ConfigError: it isn't a run's folder, has no checkpoint, or another process is using it.
    """
    run = Path(resume).expanduser()
    if not run.is_dir():
        raise ConfigError(
            f"resume={resume}: there is no such folder; grpo runs lists those of outputs.",
            key="resume",
            value=resume,
        )
    owner = find_run(run)
    if owner is not None and owner.resolve() != run.resolve():
        raise ConfigError(
            f"resume={resume}: give the run, {owner}; it is resumed from its newest checkpoint.",
            key="resume",
            value=resume,
        )
    if find_newest_checkpoint(run) is None:
        raise ConfigError(
            f"resume={resume}: has no checkpoint to resume from.", key="resume", value=resume
        )
    with locked(run):
        return run


def read_past_overrides(run: Path) -> list[str]:
    """Reads the overrides that a run was started with, its KL included."""
    return [*read_recorded_overrides(run), *read_old_kl(run)]


def read_recorded_overrides(run: Path) -> list[str]:
    return [str(override) for override in read_yaml(run / ".hydra" / "overrides.yaml") or []]


def read_old_kl(run: Path) -> list[str]:
    """Returns a run's KL as overrides, if it began before algorithms had a KL of their own."""
    config = read_yaml(run / ".hydra" / "config.yaml") or {}
    if "kl_weight" in config.get("algorithm", {}) or "kl_weight" not in config:
        return []
    hydra = read_yaml(run / ".hydra" / "hydra.yaml") or {"hydra": {}}
    choice = hydra["hydra"].get("runtime", {}).get("choices", {}).get("kl", "k3")
    old = {"kl": choice, "kl_weight": config["kl_weight"], "kl.within": config["kl"]["within"]}
    recorded = {parse_key(override) for override in read_recorded_overrides(run)}
    return [f"{key}={value}" for key, value in old.items() if key not in recorded]


def read_past_precision(run: Path) -> str | None:
    """Returns the precision that a run computed in, as device.precision; None if it is not known.

    device.precision=auto means another one on another machine, and a resumed run would have other
    numbers.
    """
    device = str((read_summary(run) or {}).get("device", ""))
    return {"float32": "fp32", "bfloat16": "bf16"}.get(device.rpartition(", ")[2])


def read_past_flags(run: Path, given: Sequence[str]) -> list[str]:
    """Returns the --config-dir that a run was started with, unless `given` has one."""
    if has_config_dir(given):
        return []
    hydra_config = read_yaml(run / ".hydra" / "hydra.yaml") or {"hydra": {"runtime": {}}}
    sources = hydra_config["hydra"]["runtime"].get("config_sources", [])
    folders = [source["path"] for source in sources if source["provider"] == "command-line"]
    return ["--config-dir", folders[0]] if folders else []


def read_yaml(file: Path) -> Any:
    """Reads a YAML file; returns None if there is no such file.

    Raises:
        ConfigError: it is not YAML, for example after a crash while it was written.
    """
    try:
        return yaml.safe_load(file.read_text()) if file.is_file() else None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML, so how this run was started is lost.") from error


def find_newest_unfinished(overrides: Sequence[str]) -> Path | None:
    """Returns the newest unfinished run in outputs/ with the same overrides and a checkpoint.

    A run that another process is using is skipped.
    """
    wanted = drop_location_keys(overrides)
    for run in sorted(Path("outputs").glob("[0-9]*/*"), reverse=True):
        if find_newest_checkpoint(run) is None or is_finished(run) or is_locked(run):
            continue
        if drop_location_keys(read_recorded_overrides(run)) == wanted:
            return run
    return None


def drop_location_keys(overrides: Sequence[str]) -> list[str]:
    return sorted(o for o in overrides if parse_key(o) not in LOCATION_KEYS)
