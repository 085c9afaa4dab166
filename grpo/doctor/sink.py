"""The doctor beside a run: a sink that says what is wrong as soon as it shows."""

from __future__ import annotations

import logging

from grpo.config.schema import DoctorConfig
from grpo.doctor.diagnoses import diagnose
from grpo.runs.jsonl import read_lines, replace_nonfinite
from grpo.tracking.tracker import Metrics, RunInfo, Sink

log = logging.getLogger(__name__)


class DoctorSink(Sink):
    """Tells each diagnosis once, when it is first made."""

    def __init__(self, info: RunInfo, limits: DoctorConfig) -> None:
        self.info, self.limits = info, limits
        past = read_lines(info.folder / "metrics.jsonl")
        self.lines = [line for line in past if line["step"] <= info.logged_step]
        self.reported = {one.name for one in diagnose(self.lines, info.config, limits)}

    def log(self, step: int, metrics: Metrics) -> None:
        self.lines.append(replace_nonfinite({"step": step, **metrics}))
        if step % self.limits.window:
            return
        for one in diagnose(self.lines, self.info.config, self.limits):
            if one.name not in self.reported:
                self.reported.add(one.name)
                log.warning("step %d: %s", step, one)
