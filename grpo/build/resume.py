"""Begins a run: anew, or where its newest checkpoint was saved."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from grpo.build.objective import count_updates_per_step
from grpo.errors import ConfigError
from grpo.memory.budget import Budget
from grpo.models.load import LanguageModel
from grpo.runs.files import is_finished
from grpo.runs.folder import find_newest_checkpoint
from grpo.runs.progress import Progress
from grpo.runs.stop import is_sweep_job
from grpo.training.checkpoint import Checkpoints
from grpo.training.kl_penalty import NoKL
from grpo.training.optimizer import Optimizer

log = logging.getLogger(__name__)


def resume_or_start(
    cfg: DictConfig,
    checkpoints: Checkpoints,
    policy: LanguageModel,
    optimizer: Optimizer,
    kl_penalty: NoKL,
    budget: Budget,
    steps: int,
    base: str,
) -> Progress:
    """Returns step 0 of a new run, or loads this run's newest intact checkpoint.

    Raises:
        ConfigError: the run can't be resumed, or has no steps left.
    """
    run = checkpoints.run
    if cfg.resume is None or (cfg.resume == "auto" and find_newest_checkpoint(run) is None):
        if cfg.resume == "auto" and not is_sweep_job():
            log.info("resume=auto: no unfinished run with these overrides, so a new one starts.")
        # The agent of a W&B sweep has already chosen the run's id.
        wandb_id = None if is_sweep_job() else os.environ.get("WANDB_RUN_ID")
        return Progress(step=0, run_id=wandb_id or uuid.uuid4().hex[:8], base=base, unlogged={})
    start = checkpoints.load(policy, optimizer, kl_penalty, budget)
    optimizer.end_schedule_after((steps - start.step) * count_updates_per_step(cfg))
    warn_changed_kl(cfg, checkpoints.read_saved_config(start.step))
    if start.base != base:
        raise ConfigError(
            f"resume={cfg.resume}: model={cfg.model.name} has other weights now than when this run "
            f"began, so its reference would differ; start a new run without resume.",
            key="resume",
            value=cfg.resume,
        )
    if start.step >= steps and is_finished(run):
        raise ConfigError(
            f"resume={cfg.resume}: this run has already done its {steps} steps; raise max_steps or "
            f"num_epochs to continue.",
            key="resume",
            value=cfg.resume,
        )
    return start


def warn_changed_kl(cfg: DictConfig, before: Mapping[str, Any]) -> None:
    """Warns if an old run, from before algorithms set kl_weight, resumes with another kl_weight."""
    recent = "kl_weight" in before.get("algorithm", {}) or "kl_weight" not in before
    if recent or before["kl"]["estimator"] is None or before["kl_weight"] == cfg.kl_weight:
        return
    weight = before["kl_weight"]
    log.warning(
        "kl_weight is %g, but this run began with %g: its algorithm now sets kl_weight; "
        "kl_weight=%g kl=%s kl.within=%s continues as before.",
        cfg.kl_weight, weight, weight, before["kl"]["estimator"], before["kl"]["within"],
    )  # fmt: skip
