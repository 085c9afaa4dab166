"""Runs that are already there: their folders and checkpoints, and who is in them."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from grpo.errors import ConfigError
from grpo.models.files import check_reachable, local_folder, model_folder
from grpo.models.hub import holds_adapter, holds_model
from grpo.models.own_code import NeedsCode
from grpo.secrets import cross_out

log = logging.getLogger(__name__)
T = TypeVar("T")


class Occupied(ConfigError):
    """Another process is in a run's folder, which is that one's to write."""


RUNNING = "running"  # also of a run that was killed
A_LOOK = 1.0  # seconds that `is_locked` of another process may hold up a lock, at the very most
FINISHED = "finished"
ENDED = (FINISHED, "pruned")  # the statuses of runs of which nothing is left to do
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def run_of(folder: Path) -> Path | None:
    """The run that a folder is, or is a checkpoint or model of."""
    for candidate in (folder, *folder.absolute().parents[:3]):
        if (candidate / ".hydra" / "overrides.yaml").is_file():
            return candidate
    return None


def checkpoint_steps(run: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step_*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest_step(run: Path) -> Path | None:
    steps = checkpoint_steps(run)
    return steps[-1] if steps else None


def read_summary(run: Path) -> dict[str, Any] | None:
    """A run's summary.json; None where there is none that can be read."""
    try:
        content = json.loads((run / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def is_finished(run: Path) -> bool:
    return (read_summary(run) or {}).get("status") == "finished"


def put(file: Path, write: Callable[[Path], object]) -> None:
    """Writes a file at once: a reader, a kill or another writer meets the old one or the new."""
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    write(aside)
    aside.replace(file)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """As `put`."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    put(file, lambda aside: aside.write_text(text, encoding="utf-8"))


def note_failure(run: Path, reason: str) -> None:
    """Says in a run's summary.json that it failed, where it can be written."""
    content = {**(read_summary(run) or {}), "status": "failed", "error": cross_out(reason)}
    try:
        write_json(run / "summary.json", content)
    except OSError as error:
        log.warning("%s can't be written (%s).", run / "summary.json", error.strerror)


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keeps other processes out of a run's folder; the system lets go of it when a process dies.

    Raises:
        Occupied: another one is in it.
    """
    descriptor = os.open(run, os.O_RDONLY)
    try:
        until = time.monotonic() + A_LOOK
        while not take_lock(descriptor, fcntl.LOCK_EX):
            if time.monotonic() > until:
                raise Occupied(f"{run}: another process is running in this folder.")
            time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def is_locked(run: Path) -> bool:
    """Whether a process is in a run's folder, without keeping one out that wants to be."""
    descriptor = os.open(run, os.O_RDONLY)
    try:
        return not take_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def take_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def checkpoint_model(
    checkpoint: str, revision: str | None = None, trust_remote_code: bool = False
) -> Callable[[], Path]:
    """Where a run's, a checkpoint's or a model's folder is; or a hub id, downloaded by the call.

    Args:
        revision: of a hub id, or of the model that a run began with.
        trust_remote_code: code that comes with the model may be run.

    Raises:
        ConfigError: there is no model there.
    """
    if HUB_ID.fullmatch(checkpoint) and not Path(checkpoint).exists():
        return hub_model(checkpoint, revision, trust_remote_code)
    folder = model_of_checkpoint(checkpoint)
    if revision is not None and run_of(Path(checkpoint).expanduser()) is None:
        raise ConfigError(
            f"model.revision={revision}: checkpoint={checkpoint} is a folder, which has no "
            f"revisions; leave it out."
        )
    return lambda: folder


def hub_model(checkpoint: str, revision: str | None, trust_remote_code: bool) -> Callable[[], Path]:
    """Downloads what is no folder but may be a model on the hub; checks at once that one can ask.

    Raises:
        ConfigError: at once or when called, where it is neither.
    """

    def told(ask: Callable[..., T]) -> T:
        try:
            return ask("as a hub id", checkpoint, None, None, None, revision, trust_remote_code)
        except NeedsCode:
            raise
        except ConfigError as error:
            raise ConfigError(
                f"checkpoint={checkpoint}: there is no such folder; {error}"
            ) from error

    told(check_reachable)
    return partial(told, model_folder)


def model_of_checkpoint(folder: str) -> Path:
    """The model's folder in a run, in one of its checkpoints, or the folder itself.

    Raises:
        ConfigError: there is no model there.
    """
    path = Path(folder).expanduser()
    newest = newest_step(path)
    for candidate in (path / "model", *([newest / "model"] if newest else [])):
        if holds_model(candidate) or holds_adapter(candidate):
            return candidate
    return local_folder("checkpoint", folder)


def check_folder(
    run: Path, resume: str | None, model: Mapping[str, Any], adapter: Mapping[str, Any] | None
) -> None:
    """Refuses to write over another run, and to go on with another model or adapter.

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
        config = json.loads((newest / "config.json").read_text())
        saved, saved_adapter = config["model"], config["adapter"]
    except (OSError, ValueError, KeyError):
        return  # a broken checkpoint; loading it says so, and takes the one before
    for key in ("id", "path", "packaged", "revision"):
        if saved.get(key) != model[key]:  # an older one has no revision: main
            raise ConfigError(
                f"resume={resume}: this run trains model={saved['name']} "
                f"(model.{key}={saved[key]}), not model={model['name']} ({model[key]})."
            )
    if saved_adapter != (None if adapter is None else dict(adapter)):
        raise ConfigError(
            f"resume={resume}: this run trains adapter={saved_adapter}, not adapter={adapter}."
        )


def forget_unstarted(run: Path) -> None:
    """Removes a run folder that holds nothing but what was written before the run was refused."""
    before = {".hydra", "train.log", "eval.log", "wandb"}
    if {path.name for path in run.iterdir()} <= before:
        shutil.rmtree(run)
