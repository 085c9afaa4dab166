"""How far a run has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """A run's state besides weights and optimizer. Everything random follows from the step."""

    step: int  # updates done
    run_id: str  # the trackers' name for this run
    base: str  # fingerprint of the model that training began with: the reference
    seconds: float = 0.0  # spent so far, earlier parts of a resumed run included
    unlogged: dict[str, float] | None = None  # a step's metrics that still lack their evaluation
