"""Saves the project's dashboard to W&B: a view of runs, or of what a sweep has found.

    scripts/wandb_workspace ENTITY/PROJECT                       # runs: the report's own sections
    scripts/wandb_workspace ENTITY/PROJECT sweep=search          # by the keys of conf/sweep/
    scripts/wandb_workspace ENTITY/PROJECT kl_weight=0,0.1       # or by those that are given
    scripts/wandb_workspace ENTITY/PROJECT --print               # its JSON; needs no key

Each time a new view is saved, and its address printed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import wandb_workspaces.reports.v2 as panels
import wandb_workspaces.workspaces as ws
from wandb_sweep import build_sweep

from grpo.cli.exits import refuse
from grpo.errors import ConfigError
from grpo.report.run.charts import CHART_SECTIONS, Chart

USAGE = "scripts/wandb_workspace ENTITY/PROJECT [sweep=CHOICE] [--print]"
DISTRIBUTIONS = ("reward", "advantage", "length", "ratio")


def build_workspace(place: str, overrides: Sequence[str]) -> ws.Workspace:
    """The view of runs; with a study, or a key's several values, that of a sweep.

    Raises:
        ConfigError: the project isn't named, or there is nothing to sweep.
    """
    entity, _, project = place.partition("/")
    if not entity or not project:
        raise ConfigError(f"{place}: {USAGE}")
    if overrides:
        return ws.Workspace(
            entity=entity,
            project=project,
            name="GRPO: what the sweep found",
            sections=build_sweep_sections(overrides),
            settings=ws.WorkspaceSettings(x_axis="step", max_runs=50),
        )
    return ws.Workspace(
        entity=entity,
        project=project,
        name="GRPO: runs",
        sections=build_run_sections(),
        settings=ws.WorkspaceSettings(x_axis="step"),
        runset_settings=ws.RunsetSettings(
            pinned_columns=["run:displayName", "summary:objective", "summary:status"]
        ),
    )


def build_run_sections() -> list[ws.Section]:
    """The sections of a run's own page, then what only W&B has."""
    sections = [
        ws.Section(name=title, panels=[build_curve(chart) for chart in charts], is_open=n < 2)
        for n, (title, charts) in enumerate(CHART_SECTIONS.items())
    ]
    shapes = [panels.MediaBrowser(media_keys=[f"histogram/{name}"]) for name in DISTRIBUTIONS]
    rows = panels.WeavePanelSummaryTable(table_name="completions")
    return [
        *sections,
        ws.Section(name="Distributions", panels=shapes),
        ws.Section(name="What it wrote", panels=[rows]),
    ]


def build_curve(chart: Chart) -> panels.LinePlot:
    parts = chart.metrics == ("reward/*",)  # their names are each run's own
    return panels.LinePlot(
        title=chart.name,
        x="step",
        y=[] if parts else list(chart.metrics),
        metric_regex="reward/.*" if parts else None,
        log_y=chart.log or None,
        smoothing_factor=0.6 if chart.metrics == ("reward/mean",) else 0.0,
    )


def build_sweep_sections(overrides: Sequence[str]) -> list[ws.Section]:
    """What the searched keys did to the objective."""
    sweep = build_sweep(overrides)
    metric, keys = sweep["metric"]["name"], list(sweep["parameters"])
    objective = panels.SummaryMetric("objective")
    columns = [panels.ParallelCoordinatesPlotColumn(metric=panels.Config(key)) for key in keys]
    columns.append(panels.ParallelCoordinatesPlotColumn(objective, display_name=metric))
    answer = [
        panels.ParallelCoordinatesPlot(title="Every run", columns=columns),
        panels.ParameterImportancePlot(with_respect_to="objective"),
        panels.ScatterPlot(
            title="What it gained, by how far it went",
            x=panels.SummaryMetric("kl/mean"),
            y=objective,
        ),
    ]
    by_key = [panels.ScatterPlot(title=key, x=panels.Config(key), y=objective) for key in keys]
    curves = [panels.LinePlot(title=name, x="step", y=[name]) for name in (metric, "reward/mean")]
    return [
        ws.Section(name="The answer", panels=answer, is_open=True),
        ws.Section(name="By key", panels=by_key, is_open=True),
        ws.Section(name="Curves", panels=curves),
        ws.Section(name="Runs", panels=[panels.RunComparer(diff_only="split")]),
    ]


def main(arguments: Sequence[str]) -> None:
    words = [word for word in arguments if word != "--print"]
    if not words:
        raise ConfigError(USAGE)
    workspace = build_workspace(words[0], words[1:])
    if "--print" in arguments:
        model = workspace._to_model().model_dump(by_alias=True, exclude_none=True, mode="json")
        print(json.dumps(model, indent=2))
        return
    import wandb

    if not wandb.login(prompt=False, verify=False):
        raise ConfigError("saving a view needs a key: wandb login. --print shows it without one.")
    workspace.save()
    print(workspace.url)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        refuse(error)
