"""The doctor: what is wrong with a run, told by its metrics, live and in its report."""

from grpo.doctor.diagnoses import Diagnosis, Limits, diagnose
from grpo.doctor.watch import Watch

__all__ = ["Diagnosis", "Limits", "Watch", "diagnose"]
