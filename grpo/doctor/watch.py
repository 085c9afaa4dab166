"""The doctor beside a run: a sink that says what is wrong as soon as it shows."""

from __future__ import annotations

import logging

from grpo.config.schema import DoctorConfig
from grpo.doctor.diagnoses import diagnose
from grpo.runs.jsonl import finite, read_lines
from grpo.tracking.tracker import Metrics, RunInfo, Sink

log = logging.getLogger(__name__)


class Watch(Sink):
    """Tells each diagnosis once, when it is first made."""

    def __init__(self, info: RunInfo, limits: DoctorConfig) -> None:
        self.info, self.limits = info, limits
        past = read_lines(info.folder / "metrics.jsonl")
        self.lines = [line for line in past if line["step"] <= info.logged_step]
        self.told = {one.name for one in diagnose(self.lines, info.config, limits)}

    def log(self, step: int, metrics: Metrics) -> None:
        self.lines.append(finite({"step": step, **metrics}))
        if step % self.limits.window:
            return
        for one in diagnose(self.lines, self.info.config, self.limits):
            if one.name not in self.told:
                self.told.add(one.name)
                log.warning("step %d: %s", step, one)
