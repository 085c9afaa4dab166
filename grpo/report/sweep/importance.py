"""Computes how much of the objective's variance each key explains."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from grpo.report.sweep.key_figures import is_number, spans_magnitudes
from grpo.report.sweep.read import Sweep


def compute_importances(sweep: Sweep) -> dict[str, float]:
    """Returns each key's share of the variance, the largest first; empty if unknown.

    fANOVA (Hutter et al. 2014), by Optuna. The seed is one of the keys, so its share shows how
    much is chance.
    """
    jobs = [job for job in sweep.jobs if job.value is not None]
    keys = [key for key in sweep.keys_and_seed if len({str(job.values[key]) for job in jobs}) > 1]
    rows = [{key: job.values[key] for key in keys} for job in jobs]
    outcomes = [float(job.value or 0.0) for job in jobs]
    if len(set(outcomes)) < 2 or len(rows) < 4 or not keys:
        return {}
    return fanova(rows, outcomes, sweep.space)


def fanova(
    rows: Sequence[Mapping[str, Any]],
    outcomes: Sequence[float],
    searched_space: Mapping[str, Any],
) -> dict[str, float]:
    """Returns each key's share of the outcomes' variance.

    A number is on a logarithmic scale if a search sampled it on one, or if a grid's values of it
    span more than a factor of ten.

    Args:
        searched_space: the distributions of a search's numbers, as JSON; empty for a grid.
    """
    import optuna
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
    )

    space: dict[str, BaseDistribution] = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        if all(map(is_number, values)):
            low, high = min(values), max(values)
            drawn = searched_space.get(key, {}).get("attributes", {})
            log = drawn.get("log", key not in searched_space and spans_magnitudes(values))
            low, high = min(low, drawn.get("low", low)), max(high, drawn.get("high", high))
            space[key] = FloatDistribution(low, high, log=log)
        else:
            space[key] = CategoricalDistribution(sorted(set(map(str, values))))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    for row, outcome in zip(rows, outcomes, strict=True):
        params = {
            key: str(row[key]) if isinstance(scale, CategoricalDistribution) else float(row[key])
            for key, scale in space.items()
        }
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=space, value=outcome)
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {key: float(share) for key, share in found.items()}
