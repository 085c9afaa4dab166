"""Pruning of a search's jobs: a job reports its evaluations and learns whether to stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from grpo.sweep.folder import StudyFile

PruneCheck = Callable[[int, Mapping[str, float]], bool]  # step, metrics -> whether to stop


def never_prune(step: int, metrics: Mapping[str, float]) -> bool:
    return False


def make_prune_check(job: Path) -> PruneCheck:
    """Returns the check that a job in this folder calls after each step."""
    file = StudyFile.read(job.parent)
    if file is None or len(file.objectives) > 1:  # Optuna prunes by one objective only
        return never_prune
    import optuna  # takes seconds, which a grid's jobs don't need

    from grpo.sweep.study import make_pruner, open_storage, silence_optuna

    silence_optuna()
    study = optuna.load_study(
        study_name=file.study_name,
        storage=open_storage(file.storage, job.parent),
        pruner=make_pruner(file.pruner, file.pruner_options),
    )
    number = int(job.name)
    if study.trials[number].state.is_finished():  # its folder was deleted, so the job runs again
        return never_prune
    trial = optuna.trial.Trial(study, study.trials[number]._trial_id)
    reported = set(study.trials[number].intermediate_values)  # before it was resumed
    (metric,) = file.objectives

    def should_prune(step: int, metrics: Mapping[str, float]) -> bool:
        if metric not in metrics:
            return False
        if step not in reported:
            trial.report(metrics[metric], step)
        return trial.should_prune()

    return should_prune
