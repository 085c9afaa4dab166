"""Saving and loading checkpoints; a checkpoint is complete or does not exist."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.errors import ConfigError
from grpo.memory.budget import Budget
from grpo.models.fsdp import gather_weights
from grpo.models.load import LanguageModel
from grpo.parallel import ONE_RANK, Ranks
from grpo.runs.folder import list_checkpoints
from grpo.runs.progress import Progress
from grpo.training.ahead import DelayedPolicy
from grpo.training.divided_state import load_divided, save_divided, separate_divided
from grpo.training.kl_penalty import NoKL
from grpo.training.optimizer import Optimizer

log = logging.getLogger(__name__)
DIVIDED = "divided"  # the folder of tensors that are divided among processes


class Checkpoints:
    """A run's `checkpoints/` folder, which keeps the newest `keep` checkpoints, named step_N."""

    def __init__(
        self,
        run: Path,
        keep: int,
        config: Mapping[str, Any],
        ranks: Ranks = ONE_RANK,
        delayed: DelayedPolicy | None = None,
    ) -> None:
        """
        Args:
            ranks: the first writes, since all have the same state; all write what is divided.
            delayed: the copy of the policy that the next step's completions are sampled from.
        """
        self.delayed = delayed
        self.run, self.folder = run, run / "checkpoints"
        self.keep, self.config, self.ranks = keep, config, ranks

    def save(
        self,
        policy: LanguageModel,
        optimizer: Optimizer,
        kl_penalty: NoKL,
        budget: Budget,
        progress: Progress,
    ) -> Path:
        """Writes step_N under another name and renames it; keeps an intact step_N that exists."""
        target = self.folder / f"step_{progress.step}"
        partial = self.folder / f".step_{progress.step}.partial"
        state = {
            "optimizer": optimizer.state(),
            "pull": kl_penalty.state(),
            "budget": budget.state(),
            "delayed": None if self.delayed is None else self.delayed.state(),
            **vars(progress),
        }
        if not policy.is_sharded:
            if self.ranks.is_first and self._begin(target, partial):
                self._write(policy, None, state, target, partial)
        elif self.ranks.compute_on_first(lambda: self._begin(target, partial)):
            weights = gather_weights(policy.model)
            rest, divided = separate_divided(state)
            self.ranks.compute_together(lambda: save_divided(divided, partial / DIVIDED))
            self.ranks.compute_on_first(lambda: self._write(policy, weights, rest, target, partial))
        return target

    def _begin(self, target: Path, partial: Path) -> bool:
        """Makes the folder to write into; returns False if the checkpoint exists already."""
        if target.exists() and find_damage(target) is None:
            return False
        for leftover in self.folder.glob(".*"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        return True

    def _write(
        self,
        policy: LanguageModel,
        weights: dict[str, Tensor] | None,
        state: dict[str, Any],
        target: Path,
        partial: Path,
    ) -> None:
        """Writes model and state, and renames the folder when it is complete.

        Args:
            weights: of a sharded model.
        """
        policy.save(partial / "model", weights)
        torch.save(state, partial / "trainer.pt")
        (partial / "config.json").write_text(json.dumps(self.config, indent=1))
        (partial / "manifest.json").write_text(json.dumps(hash_files(partial), indent=1))
        flush_to_disk(partial)
        if target.exists():
            target.rename(self.folder / f".{target.name}.broken")
        partial.rename(target)
        link = self.run / ".latest"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        link.replace(self.folder / "latest")
        sync_path(self.folder)
        for old in list_checkpoints(self.run)[: -self.keep]:
            shutil.rmtree(old)

    def load(
        self, policy: LanguageModel, optimizer: Optimizer, kl_penalty: NoKL, budget: Budget
    ) -> Progress:
        """Loads the newest intact checkpoint into policy, optimizer, KL penalty and budget.

        Raises:
            ConfigError: no checkpoint is intact.
        """
        for path in reversed(list_checkpoints(self.run)):
            if reason := find_damage(path):
                log.warning("%s is damaged (%s); trying the checkpoint before it.", path, reason)
                continue
            state = torch.load(path / "trainer.pt", map_location="cpu", weights_only=True)
            policy.restore(path / "model")
            if policy.is_sharded or (path / DIVIDED).is_dir():
                reference = getattr(kl_penalty, "reference", None)
                moved = [] if reference is None else reference.state()
                current = {"optimizer": optimizer.state(), "pull": {"reference": list(moved)}}
                state = load_divided(state, current, path / DIVIDED)
            optimizer.load_state(state.pop("optimizer"))
            kl_penalty.load_state(state.pop("pull"))
            budget.load_state(state.pop("budget", budget.state()))  # older checkpoints have none
            delayed = state.pop("delayed", None)
            if self.delayed is not None:
                self.delayed.load_state(delayed)
            log.info("resuming from %s", path)
            return Progress(**state)
        raise ConfigError(
            f"resume: no intact checkpoint in {self.folder}; start a new run without resume."
        )

    def read_saved_config(self, step: int) -> dict[str, Any]:
        """Returns the config that the run had when it saved this step."""
        file = self.folder / f"step_{step}" / "config.json"
        config: dict[str, Any] = json.loads(file.read_text())
        return config


def hash_files(folder: Path) -> dict[str, str]:
    """Returns the sha256 of every file but manifest.json, by its path in the folder."""
    return {
        str(file.relative_to(folder)): hash_file(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "manifest.json"
    }


def hash_file(file: Path) -> str:
    total = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            total.update(block)
    return total.hexdigest()


def find_damage(folder: Path) -> str | None:
    """Returns what is wrong with a checkpoint, or None if it is intact."""
    try:
        expected = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return "no readable manifest.json"
    found = hash_files(folder)
    wrong = [name for name, sha256 in expected.items() if found.get(name) != sha256]
    return f"{', '.join(wrong)} missing or changed" if wrong else None


def flush_to_disk(folder: Path) -> None:
    """Syncs a folder and its files, so that a renamed folder is complete even after a crash."""
    for path in (folder, *folder.rglob("*")):
        sync_path(path)


def sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
