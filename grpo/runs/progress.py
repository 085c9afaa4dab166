"""Where a run is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a run is, besides weights and optimizer. Everything random follows from the step."""

    step: int  # updates done
    run_id: str  # the trackers' name for this run
    base: str  # fingerprint of the model that training began with: the reference
    seconds: float = 0.0  # spent so far, over all its parts
    unlogged: dict[str, float] | None = None  # a step's metrics that still lack their evaluation
