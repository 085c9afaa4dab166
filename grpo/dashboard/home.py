"""The first page: what there is, and the way to each of its pages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from grpo.dashboard.found import EvaluationFolder, Outputs, RunFolder, SweepFolder
from grpo.report.shell import Page, table
from grpo.runs.files import RUNNING
from grpo.sweep.folder import counted
from grpo.tracking.console import duration

SECONDS_BETWEEN_LOADS = 10  # while something runs


def home(
    outputs: Outputs, root: Path, studies: Mapping[Path, int], unreadable: Mapping[Path, str]
) -> str:
    """HTML.

    Args:
        studies: a sweep's folder -> its study's number in optuna-dashboard.
        unreadable: a sweep's folder -> why its study is not there.
    """
    page = Page(f"grpo: {root.absolute().name}")
    page.add(f"<h1>{escape(root.absolute().name)}</h1>")
    page.add(f"<p class=lead>{summed_up(outputs)}</p>")
    if not (outputs.runs or outputs.sweeps or outputs.evaluations):
        page.add("<section><p>Train one: <code>grpo</code>. This page will show it.</p></section>")
    links = ["<a href='/trackio/'>Runs in Trackio</a>"]
    if studies:
        links.append("<a href='/dashboard'>Studies in optuna-dashboard</a>")
    page.add(f"<p class=facts>{' &middot; '.join(links)}</p>")
    if outputs.broken:
        reasons = "".join(f"<li>{escape(own)}</li>" for own in outputs.broken)
        page.add(f"<section class=trouble><h2>Broken</h2><ul>{reasons}</ul></section>")
    if outputs.sweeps:
        heads = ["sweep", "jobs", "study", "each job"]
        cells = [study_cell(own, studies, unreadable) for own in outputs.sweeps]
        rows = [sweep_row(*own, root) for own in zip(outputs.sweeps, cells, strict=True)]
        page.add(f"<section><h2>Sweeps</h2>{table(heads, rows)}</section>")
    if outputs.runs:
        heads = ["run", "status", "steps", "sampled", "greedy", "time", "overrides"]
        rows = [run_row(run, root) for run in outputs.runs]
        page.add(f"<section><h2>Runs</h2>{table(heads, rows)}</section>")
    if outputs.evaluations:
        heads = ["evaluation", "of", "prompts", "sampled", "greedy", "pass@k", "overrides"]
        rows = [evaluation_row(own, root) for own in outputs.evaluations]
        page.add(f"<section><h2>Evaluations</h2>{table(heads, rows)}</section>")
    if any(status == RUNNING for status in statuses(outputs)):
        page.reload(SECONDS_BETWEEN_LOADS)
    return page.html()


def statuses(outputs: Outputs) -> Iterable[str]:
    yield from (run.status for run in outputs.runs)
    yield from (job.status for sweep in outputs.sweeps for job in sweep.jobs)


def summed_up(outputs: Outputs) -> str:
    going = sum(status == RUNNING for status in statuses(outputs))
    runs, sweeps = len(outputs.runs), len(outputs.sweeps)
    parts = [f"{runs} run{'' if runs == 1 else 's'}", f"{sweeps} sweep{'' if sweeps == 1 else 's'}"]
    return f"{', '.join(parts)}; {f'{going} running now' if going else 'nothing runs just now'}."


def run_row(run: RunFolder, root: Path) -> str:
    first, last = run.summary.get("first_evaluation"), run.summary.get("last_evaluation")
    gains = [gain(first, last, f"eval/{key}") for key in ("sampled_accuracy", "accuracy")]
    steps = f"{run.summary.get('steps', 0)} of {run.summary.get('total_steps', '?')}"
    time = duration(run.summary.get("wall_seconds") or 0)
    cells = [run.status, steps, *gains, time, " ".join(run.overrides)]
    rest = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f"<tr><td>{link('run', run.folder, root)}</td>{rest}</tr>"


def evaluation_row(own: EvaluationFolder, root: Path) -> str:
    shares = [
        gain(None, own.found, f"eval/{key}")
        for key in ("sampled_accuracy", "accuracy", "pass_at_k")
    ]
    place, given = str(own.folder.relative_to(root)), " ".join(own.overrides)
    cells = [place, str(own.found["checkpoint"]), str(own.found["prompts"]), *shares, given]
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def gain(first: Mapping[str, Any] | None, last: Mapping[str, Any] | None, key: str) -> str:
    values = [own.get(key) for own in (first, last) if own]
    told = [f"{value:.1%}" for value in values if value is not None]
    return " \u2192 ".join(dict.fromkeys(told))


def study_cell(
    sweep: SweepFolder, studies: Mapping[Path, int], unreadable: Mapping[Path, str]
) -> str:
    if sweep.folder in unreadable:
        return f"can't be read: {escape(unreadable[sweep.folder])}"
    if sweep.folder in studies:
        return f"<a href='/dashboard/studies/{studies[sweep.folder]}'>in optuna-dashboard</a>"
    return ""


def sweep_row(sweep: SweepFolder, study: str, root: Path) -> str:
    counts = counted(job.status for job in sweep.jobs)
    begun = [job for job in sweep.jobs if job.status != "none"]
    jobs = " ".join(link("run", job.folder, root, str(job.number)) for job in begun)
    return (
        f"<tr><td>{link('sweep', sweep.folder, root)}</td><td>{escape(counts)}</td>"
        f"<td>{study}</td><td class=long>{jobs}</td></tr>"
    )


def link(kind: str, folder: Path, root: Path, text: str = "") -> str:
    place = str(folder.relative_to(root))
    return f"<a href='/{kind}/{quote(place)}'>{escape(text or place)}</a>"
