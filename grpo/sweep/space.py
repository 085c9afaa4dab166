"""A search's space: Hydra's syntax for several values, as Optuna's distributions."""

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
    """Returns the distribution of each key with several values; a key's last override wins.

    Raises:
        ConfigError: Optuna can't sample a key.
    """
    swept = {o.get_key_element(): o for o in overrides}
    return {key: make_distribution(o) for key, o in swept.items() if o.is_sweep_override()}


def make_distribution(override: Override) -> BaseDistribution:
    """Converts an override to a distribution: an interval, a range with steps, or a choice.

    Raises:
        ConfigError: it has no values, equal values, or values without a logarithm.
    """
    values, text = override.value(), override.input_line
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
                raise ValueError("the range is empty")
            width = abs(values.step)
            if all(isinstance(step, int) for step in steps):
                return IntDistribution(steps[0], steps[-1], log=log, step=int(width))
            return FloatDistribution(steps[0], steps[-1], log=log, step=float(width))
    except ValueError as error:
        raise ConfigError(f"{text}: can't be sampled ({error}).") from error
    if log:
        raise ConfigError(f"{text}: only an interval or a range can have a logarithmic scale.")
    choices = [encode_choice(value) for value in override.sweep_iterator()]
    if len(set(map(str, choices))) < len(choices):
        raise ConfigError(f"{text}: has the same value twice.")
    return CategoricalDistribution(choices)


def encode_choice(value: object) -> Any:
    """Returns a choice that Optuna can store; lists and dicts become text in Hydra's syntax."""
    if isinstance(value, QuotedString):
        return value.with_quotes()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return Transformer.str(value)  # type: ignore[arg-type]


def format_override(key: str, value: object) -> str:
    """Formats a value as an override."""
    if value is None:
        return f"{key}=null"
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"


def list_corners(space: Space) -> list[dict[str, Any]]:
    """Returns the lowest values with every choice, and the highest: if these run, the rest do."""
    lowest: dict[str, Any] = {}
    highest: dict[str, Any] = {}
    for key, distribution in space.items():
        if isinstance(distribution, CategoricalDistribution):
            lowest[key], highest[key] = distribution.choices[0], distribution.choices[-1]
        elif isinstance(distribution, IntDistribution | FloatDistribution):
            lowest[key], highest[key] = distribution.low, distribution.high
    others = [
        {**lowest, key: choice}
        for key, distribution in space.items()
        if isinstance(distribution, CategoricalDistribution)
        for choice in distribution.choices[1:]
    ]
    return [lowest, *others, highest]


def list_combinations(space: Space) -> list[dict[str, Any]]:
    """Returns every combination of values.

    Raises:
        ConfigError: a key has infinitely many values, or a logarithmic scale.
    """
    found: list[dict[str, Any]] = [{}]
    for key, distribution in space.items():
        values = list_values(key, distribution)
        found = [{**combination, key: value} for combination in found for value in values]
    return found


def list_values(key: str, distribution: BaseDistribution) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution) and not distribution.log:
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        count = round((distribution.high - distribution.low) / distribution.step) + 1
        return [distribution.low + n * distribution.step for n in range(count)]
    raise ConfigError(f"{key}: hydra.sweeper.sampler=grid takes only choices and ranges.")
