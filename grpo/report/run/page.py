"""A run's page: result, diagnoses, charts, completions, config; and a page of several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grpo.report.html import COLORS, Page, PlacedFigure
from grpo.report.run.browser import add_answers, add_completions
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
    differences = diff_configs([load_default_config(), run.config])
    values = {
        "result": describe_result(run),
        "facts": format_facts(run),
        "diagnoses": run.diagnoses,
        "health": describe_health(run),
        "sections": place_charts(page, [run]),
        "overrides": " ".join(run.overrides),
        "differences": [
            (key, format_config_value(value), format_config_value(default))
            for key, (default, value) in differences.items()
        ],
        "answers": add_answers(page, run),
        "steps": 0,
        "steps_shown": 0,
    }
    size = len(page.render("run.html", ["browser.js"], **values))
    values["steps"], values["steps_shown"] = add_completions(page, run, size)
    return page.render("run.html", ["browser.js"], **values)


def render_runs_page(runs: Sequence[Run]) -> str:
    """Returns the page of several runs, drawn in the same charts, as HTML."""
    page = Page(", ".join(run.name for run in runs))
    differences = diff_configs([run.config for run in runs])
    return page.render(
        "runs.html",
        runs=[
            {
                "name": run.name,
                "result": describe_result(run),
                "color": COLORS[number % len(COLORS)],
            }
            for number, run in enumerate(runs)
        ],
        differences=[
            (key, *map(format_config_value, values)) for key, values in differences.items()
        ],
        sections=place_charts(page, runs),
    )


def place_charts(page: Page, runs: Sequence[Run]) -> list[tuple[str, list[PlacedFigure]]]:
    """Adds the charts of all sections to a page; returns each section's title and figures."""
    return [
        (title, [page.place_figure(c.name, c.meaning, figure) for c, figure in drawn])
        for title, drawn in build_sections(runs)
    ]


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


def describe_health(run: Run) -> str:
    """Describes a run without diagnoses; "" if no doctor looked at it."""
    if not run.config.get("doctor"):
        return ""
    if len(run.steps) < run.config["doctor"]["patience"]:
        return "The run is too short for a diagnosis."
    return "The doctor found nothing wrong."


def format_config_value(value: object) -> str:
    return "null" if value is None else str(value)
