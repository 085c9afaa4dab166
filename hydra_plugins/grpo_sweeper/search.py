"""`hydra/sweeper=optuna`: conf/hydra/sweeper/optuna.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSweeper(Sweeper):
    """A search for the best values; see `grpo.sweep.search`."""

    def __init__(self, params: Mapping[str, Any] | None, **options: Any) -> None:
        self.params, self.options = params or {}, options

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        from grpo.sweep.launch import prepared

        self.launch = prepared(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:
        from grpo.sweep.search import search
        from grpo.sweep.study import Options

        end = search(self.launch, self.params, arguments, Options.of(self.options))

        from grpo.commands.report import report_sweep_end  # only now: it brings the drawing with it

        report_sweep_end(end)
