"""Weights & Biases."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grpo.errors import ConfigError
from grpo.past import ENDED
from grpo.tracking.tracker import CompletionRow, Metrics, RunInfo, Sink, values_of

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

# W&B makes a section of each, with the training's own step below every chart.
SECTIONS = (
    "reward", "kl", "loss", "policy", "completion", "eval",
    "optim", "sampler", "histogram", "time", "perf", "memory",
)  # fmt: skip
BEST_IS_HIGHEST = (  # their best is in the run's summary beside their last
    "reward/mean", "eval/reward", "eval/accuracy", "eval/sampled_accuracy", "eval/pass_at_k",
)  # fmt: skip


class WandB(Sink):
    """One W&B run for one run here, the same one after a resume, always finished."""

    def __init__(
        self,
        info: RunInfo,
        project: str,
        entity: str | None,
        mode: str,
        group: str | None,
        tags: Sequence[str],
        notes: str | None,
        table_every: int,
        log_model: bool,
    ) -> None:
        """mode: auto is online where a key is known, else offline. table_every: steps, 0: never."""
        import wandb

        self.info, self.table_every, self.log_model = info, table_every, log_model
        asked = mode
        if asked == "auto":
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        self.mode = os.environ.get("WANDB_MODE", mode) if asked == "auto" else mode
        arguments: dict[str, Any] = {
            "mode": self.mode,
            "project": project,
            "entity": entity,
            "id": info.id,
            "name": info.name,
            "group": group or info.group,
            "tags": list(tags),
            "notes": notes,
            "config": {**info.config, "git_commit": info.commit},
            "dir": str(info.folder),
            "resume": "allow" if self.mode == "online" else None,
            "reinit": "finish_previous",
            "settings": wandb.Settings(silent=True, console="off", init_timeout=30),
        }
        try:
            self.run = wandb.init(**arguments)
        except wandb.errors.Error as error:
            if asked == "online":
                raise ConfigError(f"tracking.wandb.mode=online: {error}") from error
            log.warning("W&B can't be reached (%s); this run is recorded offline.", error)
            self.mode = "offline"
            self.run = wandb.init(**{**arguments, "mode": "offline", "resume": None})
        self.run.define_metric("step", hidden=True)
        for section in SECTIONS:
            self.run.define_metric(f"{section}/*", step_metric="step")
        for name in BEST_IS_HIGHEST:
            self.run.define_metric(name, step_metric="step", summary="last,max")
        self.run.define_metric("completions", step_metric="step")
        self.table: Any = None

    def log(self, step: int, metrics: Metrics) -> None:
        self.run.log({"step": step, **metrics}, step=step)

    def completions(self, rows: Sequence[CompletionRow]) -> None:
        import wandb

        if not rows or not self.table_every or rows[0].step % self.table_every:
            return
        flat = [row.flat() for row in rows]
        if self.table is None:
            self.table = wandb.Table(columns=list(flat[0]), log_mode="INCREMENTAL")
        for row in flat:
            self.table.add_data(*row.values())
        self.run.log({"completions": self.table}, step=rows[0].step)

    def distributions(self, step: int, values: Mapping[str, Tensor]) -> None:
        import wandb

        found = {name: values_of(own) for name, own in values.items()}
        drawn = {name: wandb.Histogram(own.tolist()) for name, own in found.items() if len(own)}
        self.run.log(drawn, step=step)

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        import wandb

        folder = self.run.dir
        self.run.summary.update({"status": status, "objective": summary["objective"]["value"]})
        if self.log_model and status == "finished":
            facts = {key: summary[key] for key in ("objective", "last_evaluation", "steps")}
            artifact = wandb.Artifact(f"model-{self.info.id}", type="model", metadata=facts)
            artifact.add_dir(str(self.info.folder / "checkpoints" / "latest" / "model"))
            self.run.log_artifact(artifact)
        self.run.finish(exit_code=0 if status in ENDED else 1)
        if self.mode == "offline":
            log.info("W&B ran offline; to upload: wandb sync %s", folder.removesuffix("/files"))
