"""Going back to a run: its overrides put before today's, and nothing of it lost if refused."""

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
from grpo.runs.files import is_finished
from grpo.runs.folder import find_newest_checkpoint, find_run
from grpo.runs.lock import is_locked, locked


def format_run_dir(run: Path) -> str:
    """The override that sends a run to a folder, whatever signs are in its name."""
    return f"hydra.run.dir={quote_value(run)}"


def find_resumable_run(resume: str) -> Path:
    """The run's folder that `resume` names.

    Raises:
        ConfigError: it isn't one, has no checkpoint, or is being run just now.
    """
    run = Path(resume).expanduser()
    if not run.is_dir():
        raise ConfigError(f"resume={resume}: there is no such folder.")
    whole = find_run(run)
    if whole is not None and whole.resolve() != run.resolve():
        raise ConfigError(
            f"resume={resume}: give the run, {whole}; it goes on from its newest checkpoint."
        )
    if find_newest_checkpoint(run) is None:
        raise ConfigError(f"resume={resume}: no checkpoint in it, so nothing to go on from.")
    with locked(run):
        return run


def read_past_overrides(run: Path) -> list[str]:
    return [*read_recorded_overrides(run), *read_old_kl(run)]


def read_recorded_overrides(run: Path) -> list[str]:
    return [str(override) for override in read_yaml(run / ".hydra" / "overrides.yaml") or []]


def read_old_kl(run: Path) -> list[str]:
    """What a run's KL was, as overrides, where it began before algorithms brought their own."""
    config = read_yaml(run / ".hydra" / "config.yaml") or {}
    if "kl_weight" in config.get("algorithm", {}) or "kl_weight" not in config:
        return []
    hydra = read_yaml(run / ".hydra" / "hydra.yaml") or {"hydra": {}}
    choice = hydra["hydra"].get("runtime", {}).get("choices", {}).get("kl", "k3")
    then = {"kl": choice, "kl_weight": config["kl_weight"], "kl.within": config["kl"]["within"]}
    given = {parse_key(override) for override in read_recorded_overrides(run)}
    return [f"{key}={value}" for key, value in then.items() if key not in given]


def read_past_flags(run: Path, given: Sequence[str]) -> list[str]:
    """The --config-dir that a run was started with, unless one is given now."""
    if has_config_dir(given):
        return []
    written = read_yaml(run / ".hydra" / "hydra.yaml") or {"hydra": {"runtime": {}}}
    sources = written["hydra"]["runtime"].get("config_sources", [])
    own = [source["path"] for source in sources if source["provider"] == "command-line"]
    return ["--config-dir", own[0]] if own else []


def read_yaml(file: Path) -> Any:
    """A file's content, None where there is none.

    Raises:
        ConfigError: it is not YAML, as after a crash in the middle of its writing.
    """
    try:
        return yaml.safe_load(file.read_text()) if file.is_file() else None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML, so how this run was started is lost.") from error


def find_newest_unfinished(overrides: Sequence[str]) -> Path | None:
    """The newest run under outputs/ of these same overrides that has a checkpoint and no end.

    One that another process is running just now is passed over.
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
