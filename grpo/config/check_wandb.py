"""Checks W&B's options before anything starts."""

from __future__ import annotations

import os

from omegaconf import DictConfig, ListConfig

from grpo.config.validation import check_choice
from grpo.errors import ConfigError

INVALID_IN_PROJECT, INVALID_IN_RUN_ID = "/\\#?%:", ":;,#?/'"  # characters that W&B does not take


def check_wandb(cfg: DictConfig) -> None:
    """Checks W&B's own rules, which W&B itself would report only after the model is loaded."""
    check_choice(cfg, "tracking.wandb.mode", ("auto", "online", "offline"))
    key, project = "tracking.wandb.project", cfg.tracking.wandb.project
    if project is None and os.environ.get("WANDB_PROJECT"):
        key, project = "WANDB_PROJECT", os.environ["WANDB_PROJECT"]
    if project is not None and (
        not isinstance(project, str)
        or not 1 <= len(project) <= 128
        or set(project) & set(INVALID_IN_PROJECT)
    ):
        raise ConfigError(
            f"{key}={project}: should be a name of 1 to 128 characters, none of "
            f"them {' '.join(INVALID_IN_PROJECT)}; an entity is a key of its own, "
            f"tracking.wandb.entity.",
            key=key,
            value=project,
        )
    tags = cfg.tracking.wandb.tags
    if not isinstance(tags, ListConfig | None):
        raise ConfigError(
            f"tracking.wandb.tags={tags}: should be a list: [{tags}]",
            key="tracking.wandb.tags",
            value=tags,
        )
    for tag in tags or ():
        if not 1 <= len(str(tag)) <= 64:
            raise ConfigError(
                f"tracking.wandb.tags: '{tag}' should have 1 to 64 characters.",
                key="tracking.wandb.tags",
            )
    run_id = os.environ.get("WANDB_RUN_ID")
    is_wrong = run_id and (run_id != run_id.strip() or set(run_id) & set(INVALID_IN_RUN_ID))
    if is_wrong and cfg.resume is None:
        raise ConfigError(
            f"WANDB_RUN_ID={run_id}: a run's id can't begin or end with a space, nor hold any of "
            f"{' '.join(INVALID_IN_RUN_ID)}"
        )
