"""Writes the report of a sweep, or of several: a page, a table, and the best setting as a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from grpo.report.sweep.best import BestSetting, build_best_setting
from grpo.report.sweep.figures import draw_figures
from grpo.report.sweep.importance import compute_importances
from grpo.report.sweep.page import render_page
from grpo.report.sweep.ranking import Ranking, rank_settings
from grpo.report.sweep.read import Sweep, read_sweeps
from grpo.runs.files import write_atomically
from grpo.sweep.folder import read_record


def write_report(folders: Sequence[Path]) -> str:
    """Writes the report, and returns the last lines for the terminal.

    Of several sweeps it goes into the first one's folder, beside the files of that one's own.
    """
    sweep = read_sweeps(folders)
    ranking = rank_settings(sweep)
    folder, joint = folders[0], len(folders) > 1
    best = choose_best(sweep, ranking, folder, "sweeps_best" if joint else "best")
    if best is not None:
        best.write()
    command = best.command if best else ""
    importances = compute_importances(sweep)
    html = build_page(sweep, ranking, command, importances)
    rows = tabulate_results(sweep)
    page, table = ("sweeps.html", "sweeps") if joint else ("report.html", "results")
    write_atomically(folder / page, lambda file: file.write_text(html, encoding="utf-8"))
    write_atomically(folder / f"{table}.csv", lambda file: rows.to_csv(file, index=False))
    write_atomically(folder / f"{table}.parquet", lambda file: rows.to_parquet(file, index=False))
    lines = [f"{sweep.objective}: {ranking.conclusion}", *explain_differences(importances)]
    lines += [f"  report: {folder}/{page}, {table}.csv"]
    return "\n".join([*lines, *([f"  best:   {command}"] if command else [])])


def render_sweep_page(folder: Path) -> str:
    """Returns the HTML that `write_report` would write of one sweep; writes nothing."""
    sweep = read_sweeps([folder])
    ranking = rank_settings(sweep)
    best = choose_best(sweep, ranking, folder)
    command = best.command if best and best.file.is_file() else ""
    return build_page(sweep, ranking, command, compute_importances(sweep))


def explain_differences(importances: Mapping[str, float]) -> list[str]:
    """Returns a line on which key causes the jobs' differences; no line if that isn't known."""
    if not importances:
        return []
    (first, share), *others = importances.items()
    rest = "".join(f", {key} {other:.0%}" for key, other in others[:2])
    return [f"  {first} explains {share:.0%} of the differences between jobs{rest} (fANOVA)"]


def build_page(
    sweep: Sweep, ranking: Ranking, command: str, importances: Mapping[str, float]
) -> str:
    return render_page(sweep, ranking, command, list(draw_figures(sweep, ranking, importances)))


def choose_best(
    sweep: Sweep, ranking: Ranking, folder: Path, name: str = "best"
) -> BestSetting | None:
    """Builds the best setting as a file; returns None if no setting has a result."""
    if not ranking.settings:
        return None
    best = ranking.settings[0]
    job = min(best.jobs, key=lambda job: int(job.values.get("seed") or 0))
    source = " and ".join(map(str, sweep.folders))
    why = f"The best setting of {source}: {sweep.objective} {ranking.adjusted_means[0]:.4g}\n"
    why += (
        f"on {len(best.by_seed)} seed{'s' if len(best.by_seed) > 1 else ''}. {ranking.conclusion}"
    )
    record = read_record(job.folder.parent)
    config_dir = record.config_dir if record else None
    return build_best_setting(folder, job.overrides, why, config_dir, name)


def tabulate_results(sweep: Sweep) -> pd.DataFrame:
    """Returns a table with a row for each job: overrides, status, objective, last metrics, time."""
    rows = []
    for job in sweep.jobs:
        last = {key: value for key, value in job.last_values.items() if key != "step"}
        rows.append(
            {
                "sweep": job.sweep,
                "job": job.number,
                "status": job.status,
                "reason": job.reason,
                **{key: convert_cell(cell) for key, cell in job.values.items() if key != "sweep"},
                "objective": job.value,
                "steps": int(job.last_values.get("step", 0)),
                "seconds": job.seconds,
                **{f"last/{key}": value for key, value in last.items()},
                "folder": str(job.folder),
            }
        )
    table = pd.DataFrame(rows)
    for key in table.columns:  # parquet requires one type for a column
        if table[key].map(type).nunique() > 1 and not pd.api.types.is_numeric_dtype(table[key]):
            table[key] = table[key].map(lambda value: None if value is None else str(value))
    return table


def convert_cell(value: object) -> object:
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
