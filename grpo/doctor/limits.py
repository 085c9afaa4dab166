"""When a run is called sick: the keys of conf/doctor/watch.yaml, and their types."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass  # not frozen: OmegaConf would take no override
class Limits:
    """docs/doctor.md explains each."""

    patience: int
    window: int
    agreeing_groups: float
    kl_high: float
    entropy_low: float
    truncated_high: float
    length_low: float
    accuracy_lost: float
    mismatch_high: float
    spike: float
    spikes: int
    moved_low: float
    failed_high: float
    overlap_high: float
    accuracy_low: float = 0.5  # that of runs whose config has none
