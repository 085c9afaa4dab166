"""Prints a study in conf/sweep/ as the YAML of a W&B sweep, whose agents run `grpo`.

    scripts/wandb_sweep [--config-dir DIR] sweep=search [overrides] > sweep.yaml
    wandb sweep sweep.yaml              # prints the sweep's id
    wandb agent ENTITY/PROJECT/ID       # on as many machines as you like

What is given beside the study is given to every run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from grpo.cli.exits import refuse
from grpo.cli.explain import explain_hydra_error
from grpo.commands.arguments import CommandParser
from grpo.config import schema
from grpo.config.overrides import parse_key, quote_value
from grpo.config.secrets import refuse_secrets
from grpo.errors import ConfigError
from grpo.sweep.check_search import select_fixed
from grpo.sweep.space import build_space, format_override, list_corners, list_values

METHODS = {"random": "random", "grid": "grid"}  # of our samplers; all others learn: bayes


def build_sweep(arguments: Sequence[str]) -> dict[str, Any]:
    """Raises ConfigError where there is nothing to sweep."""
    parser = CommandParser("scripts/wandb_sweep [--config-dir DIR] sweep=CHOICE [overrides]")
    parser.add_value("--config-dir", needs="a folder")
    options, overrides = parser.parse_known_args(arguments)
    own_configs = options.config_dir
    if own_configs is not None and not Path(own_configs).is_dir():
        raise ConfigError(f"--config-dir {own_configs}: there is no such folder.")
    search_path = [] if own_configs is None else [format_search_path(own_configs)]
    composed = compose([*search_path, *(o for o in overrides if not is_swept(o))])
    sweeper = composed.hydra.sweeper
    params = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    job_overrides = [o for o in overrides if not parse_key(o).startswith("hydra")]
    parsed = OverridesParser.create().parse_overrides([*params, *job_overrides])
    space = build_space(parsed)
    if not space:
        raise ConfigError("nothing to sweep; name a study: scripts/wandb_sweep sweep=search")
    for values in list_corners(space):  # an agent would find a wrong value one run after the other
        compose(
            [
                *search_path,
                *select_fixed(parsed),
                *(format_override(key, value) for key, value in values.items()),
            ]
        )
    searches = "sampler" in sweeper
    method = METHODS.get(sweeper.sampler, "bayes") if searches else "grid"
    objectives = sweeper.objectives or {composed.objective: sweeper.direction}
    if len(objectives) > 1:
        raise ConfigError("hydra.sweeper.objectives: a W&B sweep has one.")
    (metric, goal), *_ = objectives.items()
    flags = [] if own_configs is None else ["--config-dir", own_configs]
    content = {
        "program": "grpo",
        "method": method,
        "metric": {"name": metric, "goal": goal},
        "parameters": {
            key: format_parameter(key, distribution, method) for key, distribution in space.items()
        },
        # One run for each; hydra.mode undoes what makes a sweep of the study itself.
        "command": ["grpo", *flags, *select_fixed(parsed), "hydra.mode=RUN", "${args_no_hyphens}"],
    }
    if searches:
        content["run_cap"] = sweeper.n_trials
        if sweeper.pruner != "none":
            content["early_terminate"] = {"type": "hyperband", "min_iter": 2}
    return content


def format_search_path(folder: str) -> str:
    """What --config-dir is to Hydra's command, as an override."""
    return f"hydra.searchpath=[{quote_value(f'file://{Path(folder).absolute()}')}]"


def compose(overrides: Sequence[str]) -> DictConfig:
    schema.register_schema()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(schema.find_conf_folder()), version_base="1.3"):
        try:
            composed = hydra.compose("config", list(overrides), return_hydra_config=True)
        except (HydraException, MissingConfigException, OmegaConfBaseException) as error:
            raise explain_hydra_error(error, "config", overrides) from error
    refuse_secrets(composed)
    return composed


def is_swept(override: str) -> bool:
    try:
        (parsed,) = OverridesParser.create().parse_overrides([override])
    except OverrideParseException:
        raise ConfigError(f"{override}: not an override; write key=value.") from None
    return bool(parsed.is_sweep_override())


def format_parameter(key: str, distribution: BaseDistribution, method: str) -> dict[str, Any]:
    """A key's values as W&B writes them."""
    if method == "grid" or isinstance(distribution, CategoricalDistribution):
        return {"values": list_values(key, distribution)}
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    bounds = {"min": distribution.low, "max": distribution.high}
    if distribution.log and isinstance(distribution, IntDistribution):
        # W&B has no whole numbers by magnitude.
        return {"values": list_by_magnitude(distribution.low, distribution.high)}
    if distribution.log:
        return {"distribution": "log_uniform_values", **bounds}
    if isinstance(distribution, IntDistribution):
        if distribution.step == 1:
            return {"distribution": "int_uniform", **bounds}
        return {"values": list_values(key, distribution)}
    if distribution.step is not None:
        return {"distribution": "q_uniform", "q": distribution.step, **bounds}
    return {"distribution": "uniform", **bounds}


def list_by_magnitude(low: int, high: int, most: int = 16) -> list[int]:
    """Whole numbers between two, each about as many times its neighbour."""
    ratio = high / low
    return sorted({round(low * ratio ** (n / (most - 1))) for n in range(most)})


if __name__ == "__main__":
    try:
        print(yaml.safe_dump(build_sweep(sys.argv[1:]), sort_keys=False), end="")
    except ConfigError as error:
        refuse(error)
