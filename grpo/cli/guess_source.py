"""What a user meant who gave a group something else than one of its choices."""

from __future__ import annotations

from pathlib import Path

PARALLEL = (
    "; parallel=ddp parallel.processes={0} divides a run among {0} processes. For several jobs "
    "of a sweep at once: hydra/launcher=joblib hydra.launcher.n_jobs={0}."
)


def guess_source(group: str, choice: str) -> str:
    """Says what to write for what was given as a choice; "" if that can't be guessed.

    It knows a hub id, a file or folder with data or a model, a choice's file in a folder that was
    not given with --config-dir, and a number of processes.
    """
    suffix = Path(choice).suffix.lower()
    if group == "dataset" and suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet"):
        return f"; a file is dataset=jsonl dataset.path={choice}."
    if group == "parallel" and choice.isdecimal():
        return PARALLEL.format(choice)
    if (file := Path("conf", group, f"{choice}.yaml")).is_file():
        return f"; for {file} add --config-dir conf."
    if "/" not in choice or group not in ("model", "dataset"):
        return ""
    if Path(choice).expanduser().is_dir():
        kind = {"model": "local", "dataset": "jsonl"}[group]
        return f"; a folder is {group}={kind} {group}.path={choice}."
    return f"; from the hub it is {group}=hub {group}.id={choice}."
