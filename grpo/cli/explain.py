"""Hydra's errors in one line, with the nearest right names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig

from grpo.cli.help import list_choices
from grpo.config import schema
from grpo.config.overrides import parse_key
from grpo.config.suggest import suggest_names

OPTUNA_SWEEPER_KEYS = {  # of Hydra's own Optuna sweeper, where this one has another
    "hydra/sweeper/sampler": "hydra.sweeper.sampler",
    "hydra/sweeper/pruner": "hydra.sweeper.pruner",
    "hydra.sweeper.sampler.seed": "hydra.sweeper.seed",
    "hydra.sweeper.sampler._target_": "hydra.sweeper.sampler",
    "hydra.sweeper.search_space": "hydra.sweeper.params",
    "hydra.sweeper.custom_search_space": "hydra.sweeper.params",
    "hydra.sweeper.optuna_config": "hydra.sweeper",
}


def explain_hydra_error(error: Exception, config_name: str, overrides: Sequence[str]) -> str:
    """Hydra's error as one line: what was given, and the nearest of what there is."""
    text = str(error).strip()
    for own in overrides:
        if (key := parse_key(own)) in OPTUNA_SWEEPER_KEYS:
            return f"{own}: here it is {own.lstrip('+~').replace(key, OPTUNA_SWEEPER_KEYS[key])}"
    if isinstance(error, OverrideParseException):
        return explain_bad_override(str(error.override), text)
    if isinstance(error, MissingConfigException):
        found = re.search(r"Could not find '([^']+)'", text)
        wanted = found[1] if found else str(error.missing_cfg_file)
        group, _, choice = wanted.rpartition("/")
        options = list(error.options or list_known_choices(group))
        return (
            f"{group}={choice}: no such choice{suggest_names(choice, options) or '.'} "
            f"There are {', '.join(options)}."
        )
    if there := re.search(r"An item is already at '([^']+)'", text):
        return f"+{there[1]}: this key is there already; leave out the +."
    if isinstance(error, ConfigCompositionException):
        if reason := explain_wrong_value(error):
            return reason
        unknown = re.search(
            r"Could not (?:override|append to config|delete from config)[^']*'([^']+)'", text
        )
        if unknown:
            key = unknown[1]
            return f"{key}: no such key{suggest_keys(key, config_name, overrides)}"
        if text.startswith("Error merging override ") and error.__cause__ is not None:
            reason = str(error.__cause__).splitlines()[0]
            return f"{text.removeprefix('Error merging override ')}: {reason}"
    return text.splitlines()[0]


def explain_bad_override(override: str, message: str) -> str:
    """Why Hydra can't read an override: its own reason where a function in it fails."""
    failed = re.search(r"\w+ while evaluating '(.*?)': (.+)", message, re.DOTALL)
    if failed is None:
        return f"{override}: not an override; write key=value (quote spaces and brackets)."
    call, reason = failed[1], " ".join(failed[2].partition("See https://")[0].split())
    key = parse_key(override)
    choices_of = re.fullmatch(r"choice\((.*)\)", call, re.DOTALL)
    if choices_of and "NoneType" in reason:
        return f"{override}: choice() takes no null; write {key}={choices_of[1]}"
    reason = re.sub(r"\b(Union|Optional|List|Dict)\[.*\]", "what it takes", reason)
    return f"{override}: {call} can't be evaluated ({reason})."


def explain_wrong_value(error: BaseException) -> str | None:
    """`key: why` where a value has the wrong type."""
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ == "ValidationError":
            key = getattr(cause, "full_key", None)
            reason = str(cause).splitlines()[0]
            if key and re.search(r"is not a subclass of \w+Config\b", reason):
                return explain_section(key, reason.rpartition("value: ")[2])
            return f"{key}: {reason}"
        cause = cause.__cause__
    return None


def explain_section(section: str, value: str) -> str:
    """Says that a key holds keys, one of which may have been meant."""
    known = getattr(schema.Config(), section, None)
    own = [field.name for field in fields(known)] if is_dataclass(known) else []
    meant = f"; did you mean {section}.{own[0]}={value}?" if own[:1] == ["name"] else "."
    return f"{section}={value}: {section} holds keys: {', '.join(own)}{meant}"


def suggest_keys(key: str, config_name: str, overrides: Sequence[str]) -> str:
    """The nearest keys to one that isn't there; of Hydra's own, those of the choices made."""
    if key.partition(".")[0] != "hydra":
        return suggest_names(key, list_known_keys(config_name, overrides))
    chosen = [own for own in overrides if parse_key(own).startswith("hydra/")]
    own = list_hydra_keys(config_name, chosen)
    search = "hydra/sweeper=optuna"
    of_search = set(list_hydra_keys(config_name, [search])) - set(own)
    nearest = suggest_names(key, [*own, *of_search])
    for name in of_search:
        if nearest.startswith(f"; did you mean {name}") or key == name:
            return f"; did you mean {search} {name}?"
    return nearest


def list_hydra_keys(config_name: str, choices: list[str]) -> list[str]:
    return flatten_keys(compose(config_name, choices, with_hydra=True).hydra, "hydra.")


def list_known_choices(group: str) -> list[str]:
    return list_choices([schema.find_conf_folder()], group)


def explain_key_of_none(config_name: str, overrides: Sequence[str]) -> str:
    """Says which key belongs to a part that is none."""
    composed = compose_choices(config_name, overrides)
    for own in overrides:
        part = parse_key(own).partition(".")[0]
        if "." in parse_key(own) and part in composed and composed[part] is None:
            others = [f"{part}={choice}" for choice in list_known_choices(part) if choice != "none"]
            return (
                f"{own}: {part} is none here, which has no keys; leave it out, or set "
                f"{' or '.join(others)}."
            )
    return "a key is set of a part that is none; leave it out."


def explain_wrong_choice(overrides: Sequence[str]) -> str:
    """Says which override gives a group a number, or nothing, for a choice."""
    for own in overrides:
        group, _, value = own.partition("=")
        if group in list_groups() and not isinstance(yaml.safe_load(value), str | list):
            known = list_known_choices(group)
            meant = [key for key in vars(schema.Config) if key.startswith(f"{group}_")]
            nothing = value in ("null", "~", "")
            hint = (
                f"; did you mean {group}=none?"
                if nothing and "none" in known
                else f"; did you mean {meant[0]}={value}?"
                if meant and not nothing
                else ""
            )
            return f"{own}: no such choice{hint or '.'} There are {', '.join(known)}."
    return "a group was given something that is no choice of it."


def list_known_keys(config_name: str, overrides: Sequence[str]) -> list[str]:
    """Every key that can be set, given the groups chosen, and the groups themselves."""
    return [*list_groups(), *flatten_keys(compose_choices(config_name, overrides), "")]


def compose_choices(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """The config with the groups chosen and the keys added, and nothing else that was asked for."""
    chosen = [o for o in overrides if o.partition("=")[0] in list_groups() or o.startswith("+")]
    return compose(config_name, chosen)


def compose(config_name: str, chosen: list[str], *, with_hydra: bool = False) -> DictConfig:
    """The config with these overrides; without them where they are wrong themselves."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(schema.find_conf_folder()), version_base="1.3"):
        try:
            return hydra.compose(config_name, chosen, return_hydra_config=with_hydra)
        except HydraException:
            return hydra.compose(config_name, return_hydra_config=with_hydra)


def list_groups() -> list[str]:
    return sorted(path.name for path in schema.find_conf_folder().iterdir() if path.is_dir())


def flatten_keys(node: DictConfig, prefix: str) -> list[str]:
    keys = []
    for key in map(str, node):
        keys.append(f"{prefix}{key}")
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
            keys += flatten_keys(child, f"{prefix}{key}.")
    return keys
