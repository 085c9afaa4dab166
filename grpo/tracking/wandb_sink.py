"""The Weights & Biases sink."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.errors import ConfigError, format_error
from grpo.runs.files import ENDED
from grpo.tracking.tracker import CompletionRow, Metrics, RunInfo, Sink, select_finite

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

PROJECT = "grpo-bench"
DATA_DIR, CACHE_DIR = "WANDB_DATA_DIR", "WANDB_CACHE_DIR"
# W&B shows each as a section, in which every chart has the training step as its x-axis.
METRIC_SECTIONS = (
    "reward", "kl", "loss", "policy", "completion", "eval",
    "optim", "sampler", "histogram", "time", "perf", "memory",
)  # fmt: skip
BEST_IS_HIGHEST = (  # the run's summary has their highest value beside their last
    "reward/mean", "eval/reward", "eval/accuracy", "eval/sampled_accuracy", "eval/pass_at_k",
)  # fmt: skip


class WandB(Sink):
    """Records a run as one W&B run, which a resumed run continues and which is always finished."""

    def __init__(
        self,
        info: RunInfo,
        project: str | None,
        entity: str | None,
        mode: str,
        group: str | None,
        tags: Sequence[str] | None,
        notes: str | None,
        table_every: int,
        log_model: bool,
    ) -> None:
        """Starts the W&B run; an argument that is None comes from W&B's environment variables.

        Args:
            mode: online, offline, or auto: online if an API key is known, else offline.
            table_every: steps between tables of completions; 0: none.

        Raises:
            ConfigError: W&B rejects the arguments, or can't be reached with mode=online.
        """
        import wandb

        self.info, self.table_every = info, table_every
        self.log_model = log_model and info.job_type == "train"
        try:
            self.run, self.mode = open_run(
                mode,
                {
                    "project": project or os.environ.get("WANDB_PROJECT") or PROJECT,
                    "entity": entity,
                    "id": info.id,
                    "name": info.name,
                    "job_type": info.job_type,
                    "group": group or os.environ.get("WANDB_RUN_GROUP") or info.group,
                    "tags": None if tags is None else list(tags),
                    "notes": notes,
                    "config": {**info.config, "git_commit": info.commit},
                    "dir": str(info.folder),
                    "reinit": "finish_previous",
                },
            )
        except (wandb.errors.Error, ValueError, TypeError) as error:  # or WANDB_…
            key = "tracking.wandb.mode=online" if mode == "online" else "tracking.wandb"
            raise ConfigError(f"{key}: {format_error(error)}") from error
        self.run.define_metric("step", hidden=True)
        for section in METRIC_SECTIONS:
            self.run.define_metric(f"{section}/*", step_metric="step")
        for name in BEST_IS_HIGHEST:
            self.run.define_metric(name, step_metric="step", summary="last,max")
        self.run.define_metric("completions", step_metric="step")
        self.table: Any = None

    def log(self, step: int, metrics: Metrics) -> None:
        self.run.log({"step": step, **metrics}, step=step)

    def log_completions(self, rows: Sequence[CompletionRow]) -> None:
        import wandb

        if not rows or not self.table_every or rows[0].step % self.table_every:
            return
        flat = [row.to_table_row() for row in rows]
        if self.table is None:
            self.table = wandb.Table(columns=list(flat[0]), log_mode="INCREMENTAL")
        for row in flat:
            self.table.add_data(*row.values())
        with self.staging():
            self.run.log({"completions": self.table}, step=rows[0].step)

    def log_distributions(self, step: int, values: Mapping[str, Tensor]) -> None:
        import wandb

        found = {name: select_finite(tensor) for name, tensor in values.items()}
        histograms = {name: wandb.Histogram(v.tolist()) for name, v in found.items() if len(v)}
        self.run.log(histograms, step=step)

    @contextmanager
    def staging(self) -> Iterator[None]:
        """Within it, W&B keeps an artifact's files in the run's folder until they are uploaded.

        Otherwise it keeps them in the home directory. WANDB_DATA_DIR wins if it is set.
        """
        with default_variable(DATA_DIR, self.info.folder / "wandb"):
            yield

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        import wandb

        folder = self.run.dir
        self.run.summary.update({"status": status, "objective": summary["objective"]["value"]})
        if self.log_model and status == "finished":
            facts = {key: summary[key] for key in ("objective", "last_evaluation", "steps")}
            artifact = wandb.Artifact(f"model-{self.info.id}", type="model", metadata=facts)
            with self.staging():
                artifact.add_dir(str(self.info.folder / "checkpoints" / "latest" / "model"))
                self.run.log_artifact(artifact)
        self.run.finish(exit_code=0 if status in ENDED else 1)
        if self.mode == "offline":
            parts = sorted(run.name for run in Path(folder).parents[1].glob("offline-run-*"))
            places = " ".join(str(Path(folder).parents[1] / part) for part in parts)
            log.info("W&B ran offline; to upload: wandb sync %s", places)


@contextmanager
def default_variable(name: str, folder: Path) -> Iterator[None]:
    """Within it, a variable of W&B's names this folder, unless it names another already."""
    asked = os.environ.get(name)
    os.environ[name] = asked or str(folder)
    try:
        yield
    finally:
        if asked is None:
            del os.environ[name]


def open_run(mode: str, arguments: Mapping[str, Any]) -> tuple[Any, str]:
    """Starts the W&B run; returns it and its mode, offline if W&B can't be reached.

    Raises:
        ConfigError: W&B can't be reached, and mode is online.
    """
    import wandb

    chosen: Any = mode
    if mode == "auto":
        known = wandb.login(prompt=False, verify=False)
        chosen = os.environ.get("WANDB_MODE", "online" if known else "offline")
    settings = wandb.Settings(silent=True, console="off", init_timeout=30)
    try:
        # The process that this starts logs into its cache.
        with default_variable(CACHE_DIR, Path(arguments["dir"]) / "wandb" / "cache"):
            return wandb.init(**arguments, mode=chosen, resume="allow", settings=settings), chosen
    except wandb.errors.UsageError:
        raise
    except wandb.errors.Error as error:
        if mode == "online":
            raise ConfigError(f"tracking.wandb.mode=online: {format_error(error)}") from error
        log.warning("W&B can't be reached (%s); this run is recorded offline.", error)
        return wandb.init(**arguments, mode="offline", resume="allow", settings=settings), "offline"
