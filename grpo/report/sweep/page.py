"""A sweep's page: conclusion, ranking, figures, jobs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

from grpo.report.html import Page, render_row, render_table
from grpo.report.sweep.ranking import Ranking, format_value
from grpo.report.sweep.read import Job, Sweep
from grpo.sweep.folder import count_by_status


def render_page(
    sweep: Sweep,
    ranking: Ranking,
    command: str,
    figures: Sequence[tuple[str, str, go.Figure]],
) -> str:
    """Returns the page as HTML. command: runs the best setting again; empty if there is none."""
    page = Page(f"Sweep {', '.join(folder.name for folder in sweep.folders)}")
    counts = count_by_status(job.status for job in sweep.jobs)
    page.add(f"<h1>{escape(page.title)}</h1><p class=lead>{escape(ranking.conclusion)}</p>")
    page.add(
        f"<p class=facts>{len(sweep.jobs)} jobs: {escape(counts)}. {format_objectives(sweep)}</p>"
    )
    if command:
        page.add(f"<p>The best setting again:</p><pre>{escape(command)}</pre>")
    page.add(render_failures(sweep.jobs))
    page.add(render_ranking(sweep, ranking))
    for name, meaning, figure in figures:
        drawn = page.add_figure(name, meaning, json.loads(figure.to_json()))
        page.add(f"<section>{drawn}</section>")
    page.add(render_jobs(sweep))
    return page.render_html()


def format_objectives(sweep: Sweep) -> str:
    names = [
        f"<code>{escape(name)}</code>{', minimized' if direction == 'minimize' else ''}"
        for name, direction in sweep.objectives.items()
    ]
    if len(names) == 1:
        return f"Objective: {names[0]}."
    return f"Objectives: {'; '.join(names)}. Settings are ranked by the first."


def render_failures(jobs: Sequence[Job]) -> str:
    """Renders why jobs failed; "" if none did."""
    rows = [
        f"<li>job {job.number}: {escape(job.reason or job.status)}</li>"
        for job in jobs
        if job.status in ("failed", "killed")
    ]
    return (
        f"<section class=trouble><h2>Failed</h2><ul>{''.join(rows)}</ul></section>" if rows else ""
    )


def render_ranking(sweep: Sweep, ranking: Ranking) -> str:
    """Renders the ranking; if each setting has one seed, without the columns that need several."""
    if not ranking.settings:
        return ""
    repeated = any(len(setting.by_seed) > 1 for setting in ranking.settings)
    more = ["95% interval", "behind the best", "p"] if repeated else ["behind the best"]
    rows = []
    for place, setting in enumerate(ranking.settings):
        spread = setting.interval
        cells = dict.fromkeys(more, "")
        kind = ""
        if repeated and spread is not None:
            cells["95% interval"] = f"{spread.low:.4g} to {spread.high:.4g}"
        if place:
            cells["behind the best"] = f"{ranking.gaps_to_best[place - 1]:.3g}"
            if len(setting.by_seed) > 1:
                cells["p"] = f"{ranking.p[place - 1]:.3f}"
                kind = "sure" if ranking.significant[place - 1] else ""
        first = [
            *map(format_value, setting.values),
            str(len(setting.by_seed)),
            f"{setting.mean:.4g}",
        ]
        rows.append(render_row([*first, *cells.values()], kind))
    heads = [*ranking.keys, "seeds", f"mean {sweep.objective}" if repeated else sweep.objective]
    note = (
        explain_ranking(ranking)
        if repeated
        else "One seed each, so small differences may be noise."
    )
    return f"<section><h2>Ranking</h2><p>{note}</p>{render_table([*heads, *more], rows)}</section>"


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


def render_jobs(sweep: Sweep) -> str:
    keys = sweep.keys_and_seed
    heads = ["job", "status", *keys, sweep.objective, "steps", "minutes"]
    rows = []
    for job in sweep.jobs:
        cells = [
            f"{job.sweep} {job.number}".strip(),
            job.status,
            *(format_value(job.values[key]) for key in keys),
            "" if job.value is None else f"{job.value:.4g}",
            str(int(job.last_values.get("step", 0))),
            f"{job.seconds / 60:.1f}",
        ]
        rows.append(render_row(cells))
    return f"<section><h2>Jobs</h2>{render_table(heads, rows)}</section>"
