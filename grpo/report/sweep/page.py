"""A sweep's page: conclusion, ranking, figures, jobs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import plotly.graph_objects as go

from grpo.report.html import Page
from grpo.report.sweep.ranking import Ranking, format_value
from grpo.report.sweep.read import Job, Sweep
from grpo.sweep.folder import count_by_status

INTERVAL, BEHIND, P = "95% interval", "behind the best", "p"  # columns of the ranking
ONE_SEED = "One seed each, so small differences may be noise."


def render_page(
    sweep: Sweep,
    ranking: Ranking,
    command: str,
    figures: Sequence[tuple[str, str, go.Figure]],
) -> str:
    """Returns the page as HTML. command: runs the best setting again; empty if there is none."""
    page = Page(f"Sweep {', '.join(folder.name for folder in sweep.folders)}")
    repeated = any(len(setting.by_seed) > 1 for setting in ranking.settings)
    keys = sweep.keys_and_seed
    return page.render(
        "sweep.html",
        conclusion=ranking.conclusion,
        jobs=sweep.jobs,
        counts=count_by_status(job.status for job in sweep.jobs),
        objectives=sweep.objectives,
        command=command,
        failures=[job for job in sweep.jobs if job.status in ("failed", "killed")],
        note=explain_ranking(ranking) if repeated else ONE_SEED,
        heads=[
            *ranking.keys,
            "seeds",
            f"mean {sweep.objective}" if repeated else sweep.objective,
            *([INTERVAL, BEHIND, P] if repeated else [BEHIND]),
        ],
        ranking=list(list_rows(ranking, repeated=repeated)),
        figures=[
            page.place_figure(name, meaning, json.loads(figure.to_json()))
            for name, meaning, figure in figures
        ],
        job_heads=["job", "status", *keys, sweep.objective, "steps", "minutes"],
        job_rows=[list_job_cells(job, keys) for job in sweep.jobs],
    )


class Row(NamedTuple):
    """A row of the ranking."""

    cells: list[str]
    is_significant: bool  # whether the setting differs significantly from the best


def list_rows(ranking: Ranking, *, repeated: bool) -> Iterator[Row]:
    """Yields a row for each setting; with columns that need several seeds if `repeated`."""
    for place, setting in enumerate(ranking.settings):
        cells = dict.fromkeys([INTERVAL, BEHIND, P] if repeated else [BEHIND], "")
        spread, is_significant = setting.interval, False
        if repeated and spread is not None:
            cells[INTERVAL] = f"{spread.low:.4g} to {spread.high:.4g}"
        if place:
            cells[BEHIND] = f"{ranking.gaps_to_best[place - 1]:.3g}"
            if len(setting.by_seed) > 1:
                cells[P] = f"{ranking.p[place - 1]:.3f}"
                is_significant = ranking.significant[place - 1]
        values = map(format_value, setting.values)
        seeds, mean = str(len(setting.by_seed)), f"{setting.mean:.4g}"
        yield Row([*values, seeds, mean, *cells.values()], is_significant)


def list_job_cells(job: Job, keys: Sequence[str]) -> list[str]:
    return [
        f"{job.sweep} {job.number}".strip(),
        job.status,
        *(format_value(job.values[key]) for key in keys),
        "" if job.value is None else f"{job.value:.4g}",
        str(int(job.last_values.get("step", 0))),
        f"{job.seconds / 60:.1f}",
    ]


def explain_ranking(ranking: Ranking) -> str:
    """Explains how to read the table."""
    text = (
        "Intervals are Student's, of one setting's mean over seeds. p compares with the best, for "
        "all pairs of settings together (Tukey's range test and each pair's own t-test, see "
        "docs/statistics.md); a bold p is a significant difference. "
    )
    if ranking.has_missing_seeds:
        text += (
            "Not all settings have the same seeds: they are ranked by means from which a model of "
            "settings and seeds takes out what the missing seeds would change. "
        )
    return (
        f"{text}The best is chosen by the same evaluation that measures it, so expect a little "
        f"less of it on new seeds and rows."
    )
