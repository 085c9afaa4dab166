"""Reads what a search would try from its overrides, and checks it before the first trial."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from grpo.errors import ConfigError
from grpo.sweep.folder import STUDY, read_record
from grpo.sweep.launch import Launch, combine_overrides
from grpo.sweep.open_study import check_objectives
from grpo.sweep.space import Space, build_space, format_override, list_combinations, list_corners
from grpo.sweep.study import SearchOptions, silence_optuna


def check_search(
    launch: Launch, params: Mapping[str, object], arguments: Sequence[str], options: SearchOptions
) -> tuple[Space, list[str], dict[str, str]]:
    """Returns the space of a search, the overrides that its trials share, and its objectives.

    Raises:
        ConfigError: the search is not possible as given.
    """
    silence_optuna()
    overrides = OverridesParser.create(launch.context.config_loader).parse_overrides(
        combine_overrides(params, arguments)
    )
    space, fixed = build_space(overrides), select_fixed(overrides)
    if not space:
        raise ConfigError(
            "-m: nothing to search; give a key an interval, a range or a choice "
            "(kl_weight=interval(0,0.1)), or a sweep=CHOICE."
        )
    options.check_space(space)
    if options.n_jobs > 1 and type(launch.launcher).__name__ == "BasicLauncher":
        raise ConfigError(
            f"hydra.sweeper.n_jobs={options.n_jobs}: this launcher runs one job at a time; add "
            f"hydra/launcher=joblib, or start the same search several times.",
            key="hydra.sweeper.n_jobs",
            value=options.n_jobs,
        )
    if options.sampler == "grid":
        list_combinations(space)  # raises if a key has infinitely many values
    objectives = check_objectives(
        options, [launch.compose(job) for job in list_corner_jobs(fixed, space)]
    )
    folder = launch.folder
    record = read_record(folder)
    if record is not None and not (folder / STUDY).is_file():
        raise ConfigError(
            f"sweep_dir={folder}: holds a grid; give another sweep_dir.",
            key="sweep_dir",
            value=folder,
        )
    return space, fixed, objectives


def count_trials(options: SearchOptions, space: Space) -> int:
    """Returns the number of trials: a grid of choices may end before n_trials."""
    total = options.n_trials
    return min(total, len(list_combinations(space))) if options.sampler == "grid" else total


def format_distribution(distribution: BaseDistribution) -> str:
    """Formats it as `0 to 0.1`, `1e-05 to 0.001, logarithmic`, or the choices."""
    if isinstance(distribution, CategoricalDistribution):
        return ", ".join(map(str, distribution.choices))
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    step = f" in steps of {distribution.step:g}" if distribution.step else ""
    scale = ", logarithmic" if distribution.log else ""
    return f"{distribution.low:g} to {distribution.high:g}{step}{scale}"


def select_fixed(overrides: Sequence[Override]) -> list[str]:
    """Returns the overrides that all trials share."""
    return [
        f"{o.get_key_element()}={o.get_value_element_as_str()}"
        for o in {o.get_key_element(): o for o in overrides}.values()
        if not o.is_sweep_override()
    ]


def list_corner_jobs(fixed: Sequence[str], space: Space) -> Iterator[list[str]]:
    for values in list_corners(space):
        yield build_overrides(fixed, values)


def build_overrides(fixed: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    return [*fixed, *(format_override(key, value) for key, value in values.items())]
