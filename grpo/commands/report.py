"""`grpo report DIR…`: writes the page of a run, of several runs together, or of sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo.commands.describe import describe_run, describe_sweep
from grpo.errors import ConfigError, RunError
from grpo.report.run.page import render_runs_page, write_run_page
from grpo.report.run.read import is_run, make_names_unique, read_run
from grpo.report.sweep.write import write_report
from grpo.runs.files import write_atomically
from grpo.sweep.folder import SweepResult, count_by_status


def report(arguments: Sequence[str]) -> dict[str, Any]:
    """Writes report.html, for a sweep also its results and best setting, and prints where.

    The page of several runs is runs.html, that of several sweeps sweeps.html, in the first folder.

    Raises:
        ConfigError: a folder holds no run and no sweep.
    """
    folders = [Path(argument).expanduser() for argument in arguments]
    if not folders:
        raise ConfigError("grpo report DIR…: name the folder of one run or sweep at least.")
    for folder in folders:
        if not folder.is_dir():
            message = f"{folder}: there is no such folder."
            raise ConfigError(message, key="DIR", value=str(folder))
    runs = [folder for folder in folders if is_run(folder)]
    if runs and len(runs) < len(folders):
        raise ConfigError("grpo report: runs and sweeps don't go into one page.")
    if not runs:
        print(write_report(folders), flush=True)
        file = folders[0] / ("report.html" if len(folders) == 1 else "sweeps.html")
        return {"report": str(file), "sweeps": [describe_sweep(folder) for folder in folders]}
    file = runs[0] / "runs.html"
    if len(runs) == 1:
        file = write_run_page(runs[0])
    else:
        html = render_runs_page(make_names_unique([read_run(folder) for folder in runs]))
        write_atomically(file, lambda aside: aside.write_text(html, encoding="utf-8"))
    print(f"report: {file}", flush=True)
    return {"report": str(file), "runs": [describe_run(folder) for folder in runs]}


def report_sweep_end(end: SweepResult) -> None:
    """Prints how a sweep's jobs ended, and writes its report.

    Raises:
        RunError: some jobs failed.
    """
    if not end.jobs:
        print(f"\nnothing was left to do for {end.folder}.", flush=True)
        return
    print(f"\nsweep in {end.folder}: {count_by_status(job.status for job in end.jobs)}", flush=True)
    print(write_report([end.folder]), flush=True)
    if end.unsuccessful:
        lines = "\n".join(f"  {job}; in {job.folder}" for job in end.unsuccessful)
        raise RunError(
            f"{len(end.unsuccessful)} of {len(end.jobs)} jobs did not end well:\n{lines}\n"
            f"  to run what is left: grpo -m sweep_dir={end.folder}"
        )
