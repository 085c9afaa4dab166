"""Tracking: a call of `log(step, metrics)` reaches all sinks that the run was built with."""

from grpo.tracking.console import Console
from grpo.tracking.jsonl_sink import JsonlFiles
from grpo.tracking.tracker import CompletionRow, RunInfo, Sink, Tracker
from grpo.tracking.trackio_sink import Trackio
from grpo.tracking.wandb_sink import WandB

__all__ = [
    "CompletionRow",
    "Console",
    "JsonlFiles",
    "RunInfo",
    "Sink",
    "Tracker",
    "Trackio",
    "WandB",
]
