"""A sweep's page: verdict, ranking, pictures, jobs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

from grpo.report.shell import Page, row, table
from grpo.report.sweep.ranking import Ranking, shown
from grpo.report.sweep.read import Job, Sweep
from grpo.sweep.close import counted
from grpo.sweep.folder import Standing


def page(
    sweep: Sweep,
    ranking: Ranking,
    command: str,
    figures: Sequence[tuple[str, str, go.Figure]],
) -> str:
    """HTML. command: what runs the best setting again; empty where there is none."""
    made = Page(f"Sweep {', '.join(folder.name for folder in sweep.folders)}")
    whole = [Standing(job.number, job.folder, job.status, job.reason) for job in sweep.jobs]
    made.add(f"<h1>{escape(made.title)}</h1><p class=lead>{escape(ranking.verdict)}</p>")
    made.add(
        f"<p class=facts>{len(sweep.jobs)} jobs: {escape(counted(whole))}. "
        f"Objective: <code>{escape(sweep.objective)}</code>.</p>"
    )
    if command:
        made.add(f"<p>The best setting again:</p><pre>{escape(command)}</pre>")
    made.add(troubles(sweep.jobs))
    made.add(ranking_table(sweep, ranking))
    for name, meaning, figure in figures:
        drawn = made.figure(name, meaning, json.loads(figure.to_json()))
        made.add(f"<section>{drawn}</section>")
    made.add(jobs_table(sweep))
    return made.html()


def troubles(jobs: Sequence[Job]) -> str:
    """Why jobs failed; nothing where none did."""
    rows = [
        f"<li>job {job.number}: {escape(job.reason or job.status)}</li>"
        for job in jobs
        if job.status in ("failed", "killed")
    ]
    return (
        f"<section class=trouble><h2>Failed</h2><ul>{''.join(rows)}</ul></section>" if rows else ""
    )


def ranking_table(sweep: Sweep, ranking: Ranking) -> str:
    heads = [
        *ranking.keys,
        "seeds",
        f"mean {sweep.objective}",
        "95% interval",
        "behind the best",
        "p",
    ]
    rows = []
    for place, setting in enumerate(ranking.settings):
        spread = setting.interval
        behind, p, sure = "", "", ""
        if place:
            one = ranking.behind[place - 1]
            behind = f"{abs(one.mean):.3g}"
            if len(setting.by_seed) > 1:
                p = f"{ranking.p[place - 1]:.3f}"
                sure = "sure" if ranking.p[place - 1] <= 0.05 else ""
        cells = [
            *(shown(value) for value in setting.values),
            str(len(setting.by_seed)),
            f"{setting.mean:.4g}",
            "" if spread is None else f"{spread.low:.4g} to {spread.high:.4g}",
            behind,
            p,
        ]
        rows.append(row(cells, sure))
    if not rows:
        return ""
    note = (
        "Compared with the best by a paired t-test over the seeds that both have, p for all "
        "comparisons together (Holm). A bold p is a difference that the data supports."
    )
    return f"<section><h2>Ranking</h2><p>{note}</p>{table(heads, rows)}</section>"


def jobs_table(sweep: Sweep) -> str:
    keys = sweep.keys_and_seed
    heads = ["job", "status", *keys, sweep.objective, "steps", "minutes"]
    rows = []
    for job in sweep.jobs:
        cells = [
            f"{job.sweep} {job.number}".strip(),
            job.status,
            *(shown(job.values[key]) for key in keys),
            "" if job.value is None else f"{job.value:.4g}",
            str(int(job.last.get("step", 0))),
            f"{job.seconds / 60:.1f}",
        ]
        rows.append(row(cells))
    return f"<section><h2>Jobs</h2>{table(heads, rows)}</section>"
