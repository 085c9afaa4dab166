"""A sweep's report as one page that needs nothing else: no network, no other file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from grpo.report.ranking import Ranking, shown
from grpo.report.read import Job, Sweep
from grpo.sweep.close import counted
from grpo.sweep.folder import Standing

STYLE = Path(__file__).with_name("page.css")
SCRIPT = Path(__file__).with_name("page.js")


def page(
    sweep: Sweep,
    ranking: Ranking,
    command: str,
    figures: Sequence[tuple[str, str, go.Figure]],
) -> str:
    """HTML. command: what runs the best setting again; empty where there is none."""
    title = ", ".join(folder.name for folder in sweep.folders)
    whole = [Standing(job.number, job.folder, job.status, job.reason) for job in sweep.jobs]
    parts = [
        f"<h1>Sweep {escape(title)}</h1>",
        f"<p class=lead>{escape(ranking.verdict)}</p>",
        f"<p>{len(sweep.jobs)} jobs: {escape(counted(whole))}. "
        f"Objective: <code>{escape(sweep.objective)}</code>.</p>",
    ]
    if command:
        parts.append(f"<p>The best setting again:</p><pre>{escape(command)}</pre>")
    parts.append(troubles(sweep.jobs))
    parts.append(ranking_table(sweep, ranking))
    for n, (name, meaning, figure) in enumerate(figures):
        drawn = figure.to_html(
            full_html=False, include_plotlyjs=False, div_id=f"figure-{n}",
            config={"displayModeBar": False, "responsive": True},
        )  # fmt: skip
        parts.append(f"<section><h2>{escape(name)}</h2><p>{escape(meaning)}</p>{drawn}</section>")
    parts.append(jobs_table(sweep))
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE.read_text()}</style>"
        f"<script>{get_plotlyjs()}</script></head><body><main>{''.join(parts)}</main>"
        f"<script>{SCRIPT.read_text()}</script></body></html>\n"
    )


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
                sure = " class=sure" if ranking.p[place - 1] <= 0.05 else ""
        cells = [
            *(shown(value) for value in setting.values),
            str(len(setting.by_seed)),
            f"{setting.mean:.4g}",
            "" if spread is None else f"{spread.low:.4g} to {spread.high:.4g}",
            behind,
            p,
        ]
        rows.append(f"<tr{sure}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
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
        rows.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return f"<section><h2>Jobs</h2>{table(heads, rows)}</section>"


def table(heads: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return (
        f"<div class=wide><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
