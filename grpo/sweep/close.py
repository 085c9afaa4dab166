"""How a sweep ends: in a few lines, and with an error where a job did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from grpo.errors import RunError
from grpo.sweep.folder import Standing


def close(folder: Path, after: Sequence[Standing], broken: Sequence[Standing]) -> None:
    """Says what became of the jobs, and writes the report.

    Raises:
        RunError: some are broken.
    """
    if not after:
        print(f"\nnothing was left to do for {folder}.", flush=True)
        return
    from grpo.commands.report import write_report  # only now: it brings the drawing with it

    print(f"\nsweep in {folder}: {counted(own.status for own in after)}", flush=True)
    print(write_report([folder]), flush=True)
    if broken:
        lines = "\n".join(f"  {own}; in {own.folder}" for own in broken)
        raise RunError(
            f"{len(broken)} of {len(after)} jobs did not end well:\n{lines}\n"
            f"  go on with what is left: grpo -m sweep_dir={folder}"
        )


def counted(statuses: Iterable[str]) -> str:
    """`3 finished, 1 to run`"""
    words = {"none": "to run"}
    counts = Counter(words.get(status, status) for status in statuses)
    return ", ".join(f"{count} {status}" for status, count in counts.items())
