"""The home page: a list of runs, sweeps and evaluations, with links to their pages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from grpo.dashboard.outputs import EvaluationFolder, Outputs, RunFolder, SweepFolder
from grpo.report.html import Page, render_table
from grpo.runs.files import RUNNING
from grpo.sweep.folder import count_by_status
from grpo.tracking.console import format_duration

SECONDS_BETWEEN_LOADS = 10  # while something runs


def render_home(
    outputs: Outputs, root: Path, studies: Mapping[Path, int], unreadable: Mapping[Path, str]
) -> str:
    """Returns the page as HTML.

    Args:
        studies: a sweep's folder -> its study's number in optuna-dashboard.
        unreadable: a sweep's folder -> why its study can't be read.
    """
    page = Page(f"grpo: {root.absolute().name}")
    page.add(f"<h1>{escape(root.absolute().name)}</h1>")
    page.add(f"<p class=lead>{summarize_outputs(outputs)}</p>")
    if not (outputs.runs or outputs.sweeps or outputs.evaluations):
        page.add("<section><p>Start a run with <code>grpo</code>; it appears here.</p></section>")
    links = ["<a href='/trackio/'>Runs in Trackio</a>"]
    if studies:
        links.append("<a href='/dashboard'>Studies in optuna-dashboard</a>")
    page.add(f"<p class=facts>{' &middot; '.join(links)}</p>")
    if outputs.errors:
        reasons = "".join(f"<li>{escape(error)}</li>" for error in outputs.errors)
        page.add(f"<section class=trouble><h2>Broken</h2><ul>{reasons}</ul></section>")
    if outputs.sweeps:
        heads = ["sweep", "jobs", "study", "each job"]
        cells = [render_study_cell(sweep, studies, unreadable) for sweep in outputs.sweeps]
        rows = [render_sweep_row(*pair, root) for pair in zip(outputs.sweeps, cells, strict=True)]
        page.add(f"<section><h2>Sweeps</h2>{render_table(heads, rows)}</section>")
    if outputs.runs:
        heads = ["run", "status", "steps", "sampled", "greedy", "time", "overrides"]
        rows = [render_run_row(run, root) for run in outputs.runs]
        page.add(f"<section><h2>Runs</h2>{render_table(heads, rows)}</section>")
    if outputs.evaluations:
        heads = ["evaluation", "of", "prompts", "sampled", "greedy", "pass@k", "overrides"]
        rows = [render_evaluation_row(evaluation, root) for evaluation in outputs.evaluations]
        page.add(f"<section><h2>Evaluations</h2>{render_table(heads, rows)}</section>")
    if any(status == RUNNING for status in list_statuses(outputs)):
        page.reload(SECONDS_BETWEEN_LOADS)
    return page.render_html()


def list_statuses(outputs: Outputs) -> Iterable[str]:
    yield from (run.status for run in outputs.runs)
    yield from (job.status for sweep in outputs.sweeps for job in sweep.jobs)


def summarize_outputs(outputs: Outputs) -> str:
    count = sum(status == RUNNING for status in list_statuses(outputs))
    runs, sweeps = len(outputs.runs), len(outputs.sweeps)
    parts = [f"{runs} run{'' if runs == 1 else 's'}", f"{sweeps} sweep{'' if sweeps == 1 else 's'}"]
    return f"{', '.join(parts)}; {f'{count} running now' if count else 'nothing runs just now'}."


def render_run_row(run: RunFolder, root: Path) -> str:
    first, last = run.summary.get("first_evaluation"), run.summary.get("last_evaluation")
    gains = [format_gain(first, last, f"eval/{key}") for key in ("sampled_accuracy", "accuracy")]
    steps = f"{run.summary.get('steps', 0)} of {run.summary.get('total_steps', '?')}"
    time = format_duration(run.summary.get("wall_seconds") or 0)
    cells = [run.status, steps, *gains, time, " ".join(run.overrides)]
    rest = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f"<tr><td>{render_link('run', run.folder, root)}</td>{rest}</tr>"


def render_evaluation_row(evaluation: EvaluationFolder, root: Path) -> str:
    shares = [
        format_gain(None, evaluation.result, f"eval/{key}")
        for key in ("sampled_accuracy", "accuracy", "pass_at_k")
    ]
    place, overrides = str(evaluation.folder.relative_to(root)), " ".join(evaluation.overrides)
    cells = [
        place,
        str(evaluation.result["checkpoint"]),
        str(evaluation.result["prompts"]),
        *shares,
        overrides,
    ]
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def format_gain(first: Mapping[str, Any] | None, last: Mapping[str, Any] | None, key: str) -> str:
    values = [evaluation.get(key) for evaluation in (first, last) if evaluation]
    shares = [f"{value:.1%}" for value in values if value is not None]
    return " \u2192 ".join(dict.fromkeys(shares))


def render_study_cell(
    sweep: SweepFolder, studies: Mapping[Path, int], unreadable: Mapping[Path, str]
) -> str:
    if sweep.folder in unreadable:
        return f"can't be read: {escape(unreadable[sweep.folder])}"
    if sweep.folder in studies:
        return f"<a href='/dashboard/studies/{studies[sweep.folder]}'>in optuna-dashboard</a>"
    return ""


def render_sweep_row(sweep: SweepFolder, study: str, root: Path) -> str:
    counts = count_by_status(job.status for job in sweep.jobs)
    begun = [job for job in sweep.jobs if job.status != "none"]
    jobs = " ".join(render_link("run", job.folder, root, str(job.number)) for job in begun)
    return (
        f"<tr><td>{render_link('sweep', sweep.folder, root)}</td><td>{escape(counts)}</td>"
        f"<td>{study}</td><td class=long>{jobs}</td></tr>"
    )


def render_link(kind: str, folder: Path, root: Path, text: str = "") -> str:
    place = str(folder.relative_to(root))
    return f"<a href='/{kind}/{quote(place)}'>{escape(text or place)}</a>"
