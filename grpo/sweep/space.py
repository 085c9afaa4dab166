"""What a search chooses from: Hydra's own syntax for values, as Optuna's distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.types import (
    IntervalSweep,
    Override,
    QuotedString,
    RangeSweep,
    Transformer,
)
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from grpo.errors import ConfigError

Space = dict[str, BaseDistribution]


def build_space(overrides: Sequence[Override]) -> Space:
    """The distribution of each key that has several values; a later override of a key wins.

    Raises:
        ConfigError: Optuna can't sample one.
    """
    swept = {o.get_key_element(): o for o in overrides}
    return {key: make_distribution(o) for key, o in swept.items() if o.is_sweep_override()}


def make_distribution(override: Override) -> BaseDistribution:
    """Numbers between two ends, or some of them, or a choice.

    Raises:
        ConfigError: there is nothing between them, or no logarithm.
    """
    values, asked = override.value(), override.input_line
    log = "log" in getattr(values, "tags", set())
    try:
        if isinstance(values, IntervalSweep):
            low, high = values.start, values.end
            if isinstance(low, int) and isinstance(high, int):
                return IntDistribution(low, high, log=log)
            return FloatDistribution(float(low or 0), float(high or 0), log=log)
        if isinstance(values, RangeSweep):
            steps = sorted(values.range())
            if not steps:
                raise ValueError("there is no value in it")
            width = abs(values.step)
            if all(isinstance(step, int) for step in steps):
                return IntDistribution(steps[0], steps[-1], log=log, step=int(width))
            return FloatDistribution(steps[0], steps[-1], log=log, step=float(width))
    except ValueError as error:
        raise ConfigError(f"{asked}: can't be sampled ({error}).") from error
    if log:
        raise ConfigError(f"{asked}: only numbers of an interval or a range have a logarithm.")
    choices = [encode_choice(value) for value in override.sweep_iterator()]
    if len(set(map(str, choices))) < len(choices):
        raise ConfigError(f"{asked}: has the same value twice.")
    return CategoricalDistribution(choices)


def encode_choice(value: object) -> Any:
    """A choice as Optuna can keep it: what is more than a number or a word, as Hydra writes it."""
    if isinstance(value, QuotedString):
        return value.with_quotes()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return Transformer.str(value)  # type: ignore[arg-type]


def format_override(key: str, value: object) -> str:
    """A value as an override."""
    if value is None:
        return f"{key}=null"
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"


def list_corners(space: Space) -> list[dict[str, Any]]:
    """The lowest values with every choice, and the highest: if these can be run, the rest can."""
    lowest: dict[str, Any] = {}
    highest: dict[str, Any] = {}
    for key, own in space.items():
        if isinstance(own, CategoricalDistribution):
            lowest[key], highest[key] = own.choices[0], own.choices[-1]
        elif isinstance(own, IntDistribution | FloatDistribution):
            lowest[key], highest[key] = own.low, own.high
    others = [
        {**lowest, key: choice}
        for key, own in space.items()
        if isinstance(own, CategoricalDistribution)
        for choice in own.choices[1:]
    ]
    return [lowest, *others, highest]


def list_combinations(space: Space) -> list[dict[str, Any]]:
    """Every combination.

    Raises:
        ConfigError: one of the keys has no end of values.
    """
    found: list[dict[str, Any]] = [{}]
    for key, own in space.items():
        found = [{**some, key: value} for some in found for value in list_values(key, own)]
    return found


def list_values(key: str, distribution: BaseDistribution) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution) and not distribution.log:
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        count = round((distribution.high - distribution.low) / distribution.step) + 1
        return [distribution.low + n * distribution.step for n in range(count)]
    raise ConfigError(f"{key}: hydra/sweeper.sampler=grid takes choices and ranges alone.")
