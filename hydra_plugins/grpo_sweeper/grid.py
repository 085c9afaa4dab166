"""`hydra/sweeper=grid`, what -m does unless told otherwise: conf/hydra/sweeper/grid.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

if TYPE_CHECKING:
    from grpo.sweep.launch import SweepPlan


class GridSweeper(Sweeper):
    """Every combination of the values given; see `grpo.sweep.grid`."""

    def __init__(
        self,
        params: Mapping[str, Any] | None,
        direction: str,
        objectives: Mapping[str, str] | None,
    ) -> None:
        self.params = params or {}
        self.direction, self.objectives = direction, objectives

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        from grpo.sweep.launch import prepare_launch

        self.launch = prepare_launch(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:
        from grpo.sweep.grid import run_grid

        end = run_grid(self.launch, self.params, arguments, self.objectives, self.direction)

        from grpo.commands.report import report_sweep_end  # only now: it brings the drawing with it

        report_sweep_end(end)

    def plan(self, arguments: list[str]) -> SweepPlan:
        """What `sweep` would run, for `grpo check -m`."""
        from grpo.sweep.grid import plan_grid

        return plan_grid(self.launch, self.params, arguments, self.objectives, self.direction)
