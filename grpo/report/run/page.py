"""A run's page: result, diagnoses, charts, completions, config; and a page of several runs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from grpo.report.html import COLORS, Page, render_row, render_table
from grpo.report.run.browser import render_browser
from grpo.report.run.charts import build_sections
from grpo.report.run.read import Run, diff_configs, load_default_config, read_run
from grpo.runs.files import FINISHED, write_atomically


def write_run_page(folder: Path) -> Path:
    """Writes a run's report.html and returns its path.

    Raises:
        ConfigError: the folder holds no run, or the run has logged nothing yet.
    """
    html = render_run_page(read_run(folder))
    write_atomically(folder / "report.html", lambda file: file.write_text(html, encoding="utf-8"))
    return folder / "report.html"


def render_run_page(run: Run) -> str:
    """Returns the page of one run as HTML."""
    page = Page(run.name)
    page.add(f"<h1>{escape(run.name)}</h1><p class=lead>{escape(describe_result(run))}</p>")
    page.add(f"<p class=facts>{escape(format_facts(run))}</p>")
    page.add(render_diagnoses(run))
    add_charts(page, [run])
    page.add(render_browser(page, run))
    page.add(render_config(run))
    return page.render_html(["browser.js"])


def render_runs_page(runs: Sequence[Run]) -> str:
    """Returns the page of several runs, drawn in the same charts, as HTML."""
    page = Page(", ".join(run.name for run in runs))
    page.add(f"<h1>{len(runs)} runs</h1>")
    heads = ["", "run", "verdict"]
    rows = [
        f"<tr><td><i class=key style='background:{COLORS[n % len(COLORS)]}'></i></td>"
        f"<td>{escape(run.name)}</td><td class=long>{escape(describe_result(run))}</td></tr>"
        for n, run in enumerate(runs)
    ]
    page.add(f"<section>{render_table(heads, rows)}</section>")
    differences = diff_configs([run.config for run in runs])
    body = [
        render_row([key, *(format_config_value(value) for value in values)])
        for key, values in differences.items()
    ]
    table = render_table(["key", *(run.name for run in runs)], body) if body else "<p>None.</p>"
    page.add(f"<section><h2>Differences in config</h2>{table}</section>")
    add_charts(page, runs)
    return page.render_html()


def add_charts(page: Page, runs: Sequence[Run]) -> None:
    for title, drawn in build_sections(runs):
        figures = "".join(page.add_figure(c.name, c.meaning, figure) for c, figure in drawn)
        page.add(f"<section><h2>{escape(title)}</h2><div class=charts>{figures}</div></section>")


def describe_result(run: Run) -> str:
    """Describes the result in one to three sentences."""
    return describe_end(run, str(run.summary.get("error") or ""))


def describe_end(run: Run, error: str) -> str:
    """Describes the result, with this text, or none, for the error that ended the run."""
    status = str(run.summary.get("status", "unknown"))
    done = run.lines[-1]["step"]
    first, last = run.summary.get("first_evaluation"), run.summary.get("last_evaluation")
    parts = []
    if first and last and last["step"] > first["step"]:
        gains = [
            f"{label} accuracy {first[key]:.1%} \u2192 {last[key]:.1%}"
            for label, key in (("sampled", "eval/sampled_accuracy"), ("greedy", "eval/accuracy"))
            if first.get(key) is not None and last.get(key) is not None
        ]
        parts.append(f"{', '.join(gains)} in {last['step']} steps.".capitalize())
    if status != FINISHED or not parts:
        parts.append(f"{status.capitalize()} at step {done}.")
    if error:
        parts.append(error)
    kl = next((line["kl/mean"] for line in reversed(run.steps) if line.get("kl/mean")), None)
    if kl is not None:
        parts.append(f"It ended {kl:.2g} nats a token from its reference.")
    return " ".join(parts)


def format_facts(run: Run) -> str:
    seconds = run.summary.get("wall_seconds") or sum(line["time/step"] for line in run.steps)
    shape = f"{run.config['batch_size']} \u00d7 {run.config['num_generation']} completions a step"
    facts = [
        str(run.config["model"]["name"]), shape, f"{seconds / 60:.1f} minutes",
        str(run.summary.get("device") or ""), f"commit {str(run.summary['git_commit'])[:8]}"
        if run.summary.get("git_commit") else "", str(run.summary.get("started") or ""),
    ]  # fmt: skip
    return " \u00b7 ".join(part for part in facts if part)


def render_diagnoses(run: Run) -> str:
    """Renders the doctor's diagnoses, or that there are none."""
    if not run.config.get("doctor"):
        return ""
    if not run.diagnoses:
        few = len(run.steps) < run.config["doctor"]["patience"]
        text = "The run is too short for a diagnosis." if few else "The doctor found nothing wrong."
        return f"<p class=well>{text}</p>"
    rows = [
        f"<li><h3>{escape(diagnosis.title)}</h3><p>{escape(diagnosis.evidence)}</p>"
        f"<p>{escape(diagnosis.cause)}</p><p>Try: <code>{escape(diagnosis.remedy)}</code></p></li>"
        for diagnosis in run.diagnoses
    ]
    return f"<section class=trouble><h2>Diagnoses</h2><ul>{''.join(rows)}</ul></section>"


def render_config(run: Run) -> str:
    """Renders the overrides, and the keys in which the config differs from the shipped one."""
    differences = diff_configs([load_default_config(), run.config])
    rows = [
        render_row([key, format_config_value(value), format_config_value(default)])
        for key, (default, value) in differences.items()
    ]
    overrides = " ".join(run.overrides)
    return (
        f"<section><h2>Config</h2><pre>grpo {escape(overrides)}</pre>"
        f"<p>{'These keys differ from the shipped config.' if rows else 'As shipped.'}</p>"
        f"{render_table(['key', 'here', 'as shipped'], rows) if rows else ''}</section>"
    )


def format_config_value(value: object) -> str:
    return "null" if value is None else str(value)
