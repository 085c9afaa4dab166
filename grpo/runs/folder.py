"""Folders of earlier runs: finds runs, checkpoints and models, and guards against overwriting."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from grpo.errors import ConfigError
from grpo.models.files import check_reachable, find_model_folder, require_local_folder
from grpo.models.hub import holds_adapter, holds_model
from grpo.models.remote_code import UntrustedCode

log = logging.getLogger(__name__)
T = TypeVar("T")


MODEL_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_run(folder: Path) -> Path | None:
    """Returns the run that a folder is, or is a checkpoint or model of; None if there is none."""
    for candidate in (folder, *folder.absolute().parents[:3]):
        if (candidate / ".hydra" / "overrides.yaml").is_file():
            return candidate
    return None


def list_checkpoints(run: Path) -> list[Path]:
    """Returns a run's checkpoints, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step_*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def find_newest_checkpoint(run: Path) -> Path | None:
    steps = list_checkpoints(run)
    return steps[-1] if steps else None


def locate_checkpoint_model(
    checkpoint: str, revision: str | None = None, trust_remote_code: bool = False
) -> Callable[[], Path]:
    """Returns a function that returns the model's folder of a run, a checkpoint or a hub id.

    The function downloads a hub id; `checkpoint` may also be a model's folder.

    Args:
        revision: of a hub id, or of the model that a run began with.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ConfigError: there is no model.
    """
    if MODEL_ID.fullmatch(checkpoint) and not Path(checkpoint).exists():
        return locate_hub_model(checkpoint, revision, trust_remote_code)
    folder = find_checkpoint_model(checkpoint)
    if revision is not None and find_run(Path(checkpoint).expanduser()) is None:
        raise ConfigError(
            f"model.revision={revision}: checkpoint={checkpoint} is a folder, which has no "
            f"revisions; leave it out.",
            key="model.revision",
            value=revision,
        )
    return lambda: folder


def locate_hub_model(
    checkpoint: str, revision: str | None, trust_remote_code: bool
) -> Callable[[], Path]:
    """Checks that the hub can be reached; returns a function that downloads a model from it.

    Raises:
        ConfigError: the hub can't be reached; the returned function raises it too.
    """

    def call(locate: Callable[..., T]) -> T:
        try:
            return locate("as a hub id", checkpoint, None, None, None, revision, trust_remote_code)
        except UntrustedCode:
            raise
        except ConfigError as error:
            raise ConfigError(
                f"checkpoint={checkpoint}: there is no such folder; {error}",
                key="checkpoint",
                value=checkpoint,
            ) from error

    call(check_reachable)
    return partial(call, find_model_folder)


def find_checkpoint_model(folder: str) -> Path:
    """Returns the model's folder in a run, in one of its checkpoints, or the folder itself.

    Raises:
        ConfigError: there is no model.
    """
    path = Path(folder).expanduser()
    newest = find_newest_checkpoint(path)
    for candidate in (path / "model", *([newest / "model"] if newest else [])):
        if holds_model(candidate) or holds_adapter(candidate):
            return candidate
    return require_local_folder("checkpoint", folder)


def check_run_folder(
    run: Path, resume: str | None, model: Mapping[str, Any], adapter: Mapping[str, Any] | None
) -> None:
    """Checks that a run overwrites no other run, and resumes with the same model and adapter.

    Raises:
        ConfigError: the folder holds a run already, or its model or adapter is another one.
    """
    if resume is None:
        if (run / "metrics.jsonl").exists():
            raise ConfigError(
                f"hydra.run.dir={run}: holds a run already; resume={run} continues it.",
                key="hydra.run.dir",
                value=run,
            )
        return
    newest = find_newest_checkpoint(run)
    if newest is None:
        return
    try:
        config = json.loads((newest / "config.json").read_text())
        saved, saved_adapter = config["model"], config["adapter"]
    except (OSError, ValueError, KeyError):
        return  # a broken checkpoint; loading it warns and uses an earlier one
    for key in ("id", "path", "packaged", "revision"):
        if saved.get(key) != model[key]:  # older runs have no revision, that is main
            raise ConfigError(
                f"resume={resume}: this run trains model={saved['name']} "
                f"(model.{key}={saved[key]}), not model={model['name']} ({model[key]}).",
                key="resume",
                value=resume,
            )
    if saved_adapter != (None if adapter is None else dict(adapter)):
        raise ConfigError(
            f"resume={resume}: this run trains adapter={saved_adapter}, not adapter={adapter}.",
            key="resume",
            value=resume,
        )


def remove_unstarted(run: Path) -> None:
    """Removes a run folder that holds only what was written before the run was refused."""
    written_first = {".hydra", "train.log", "eval.log", "wandb"}
    if {path.name for path in run.iterdir()} <= written_first:
        shutil.rmtree(run)
