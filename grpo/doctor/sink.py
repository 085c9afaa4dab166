"""The doctor as a sink: warns of what is wrong with a run as soon as the metrics show it."""

from __future__ import annotations

import logging

from grpo.config.schema import DoctorConfig
from grpo.doctor.diagnoses import diagnose
from grpo.runs.jsonl import read_lines, replace_nonfinite
from grpo.tracking.tracker import Metrics, RunInfo, Sink

log = logging.getLogger(__name__)


class DoctorSink(Sink):
    """Logs each diagnosis once, when it is first found."""

    def __init__(self, info: RunInfo, limits: DoctorConfig) -> None:
        self.info, self.limits = info, limits
        earlier = read_lines(info.folder / "metrics.jsonl")
        self.lines = [line for line in earlier if line["step"] <= info.logged_step]
        self.reported = {found.name for found in diagnose(self.lines, info.config, limits)}

    def log(self, step: int, metrics: Metrics) -> None:
        self.lines.append(replace_nonfinite({"step": step, **metrics}))
        if step % self.limits.window:
            return
        for diagnosis in diagnose(self.lines, self.info.config, self.limits):
            if diagnosis.name not in self.reported:
                self.reported.add(diagnosis.name)
                log.warning("step %d: %s", step, diagnosis)
