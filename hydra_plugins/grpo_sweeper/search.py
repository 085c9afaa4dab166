"""`hydra/sweeper=optuna`; its keys are in conf/hydra/sweeper/optuna.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

if TYPE_CHECKING:
    from grpo.sweep.launch import SweepPlan


class OptunaSweeper(Sweeper):
    """Searches for the best values; see `grpo.sweep.search`."""

    def __init__(self, params: Mapping[str, Any] | None, **options: Any) -> None:
        self.params, self.options = params or {}, options

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        from grpo.sweep.launch import prepare_launch

        self.launch = prepare_launch(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:
        from grpo.sweep.search import run_search
        from grpo.sweep.study import SearchOptions

        result = run_search(
            self.launch, self.params, arguments, SearchOptions.from_config(self.options)
        )

        from grpo.commands.report import report_sweep_end  # late: it imports Plotly

        report_sweep_end(result)

    def plan(self, arguments: list[str]) -> SweepPlan:
        """Returns what `sweep` would run, for `grpo check -m`."""
        from grpo.sweep.search import plan_search
        from grpo.sweep.study import SearchOptions

        options = SearchOptions.from_config(self.options)
        return plan_search(self.launch, self.params, arguments, options)
