"""Explains Hydra's errors in one line, with the nearest valid names."""

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

from grpo.cli.composition import find_composed
from grpo.cli.guess_source import guess_source
from grpo.cli.help import list_choices
from grpo.config import schema
from grpo.config.foreign_names import explain_foreign_name
from grpo.config.overrides import find_value, parse_key
from grpo.config.suggest import find_nearest, format_suggestion
from grpo.errors import ConfigError

OPTUNA_SWEEPER_KEYS = {  # of Hydra's own Optuna sweeper, where this one has another
    "hydra/sweeper/sampler": "hydra.sweeper.sampler",
    "hydra/sweeper/pruner": "hydra.sweeper.pruner",
    "hydra.sweeper.sampler.seed": "hydra.sweeper.seed",
    "hydra.sweeper.sampler._target_": "hydra.sweeper.sampler",
    "hydra.sweeper.search_space": "hydra.sweeper.params",
    "hydra.sweeper.custom_search_space": "hydra.sweeper.params",
    "hydra.sweeper.optuna_config": "hydra.sweeper",
}
LIST_GROUPS = ("reward", "tracking")  # of which several go together
PREFERRED_OWNERS = {"dataset.path": "jsonl"}  # of a key that several choices of a group have


def explain_hydra_error(
    error: Exception, config_name: str, overrides: Sequence[str]
) -> ConfigError:
    """Turns an error of Hydra's into a refusal of one line: what was given, and what is near."""
    text = str(error).strip()
    for override in overrides:
        if (key := parse_key(override)) in OPTUNA_SWEEPER_KEYS:
            meant = override.lstrip("+~").replace(key, OPTUNA_SWEEPER_KEYS[key])
            nearest = [OPTUNA_SWEEPER_KEYS[key]]
            return ConfigError(f"{override}: here it is {meant}", key=key, nearest=nearest)
    if isinstance(error, OverrideParseException):
        override = str(error.override)
        return ConfigError(explain_bad_override(override, text), key=parse_key(override))
    if isinstance(error, MissingConfigException):
        found = re.search(r"Could not find '([^']+)'", text)
        wanted = found[1] if found else str(error.missing_cfg_file)
        group, _, choice = split_choice(wanted, overrides)
        return explain_unknown_choice(group, choice, error.options or list_known_choices(group))
    if there := re.search(r"An item is already at '([^']+)'", text):
        message = f"+{there[1]}: this key is there already; leave out the +."
        return ConfigError(message, key=there[1], nearest=[there[1]])
    if several := re.match(r"Ambiguous value for argument '(.+)'", text):
        return explain_several_values(several[1])
    if isinstance(error, ConfigCompositionException):
        if reason := explain_wrong_value(error):
            return reason
        unknown = re.search(
            r"Could not (?:override|append to config|delete from config)[^']*'([^']+)'", text
        )
        if unknown:
            return explain_unknown_key(unknown[1], config_name, overrides, find_composed(error))
        if text.startswith("Error merging override ") and error.__cause__ is not None:
            reason_text = str(error.__cause__).splitlines()[0]
            override = text.removeprefix("Error merging override ")
            return ConfigError(f"{override}: {reason_text}", key=parse_key(override))
    return ConfigError(text.splitlines()[0])


def split_choice(wanted: str, overrides: Sequence[str]) -> tuple[str, str, str]:
    """Splits Hydra's message into a group and an unknown choice, which may contain a slash."""
    for override in overrides:
        group, equals, choice = override.lstrip("+").partition("=")
        if equals and f"{group}/{choice}" == wanted:
            return group, "/", choice
    return wanted.rpartition("/")


def explain_unknown_choice(
    group: str, choice: str, options: Sequence[str], meant: str = ""
) -> ConfigError:
    """Names the choices of a group, and the one that was probably meant."""
    known = [option for option in options if not option.rpartition("/")[2].startswith("_")]
    near = find_nearest(choice, known)
    there = f"There are {', '.join(known)}." if len(known) > 1 else f"The only one is {known[0]}."
    meant = meant or guess_source(group, choice) or format_suggestion(near) or "."
    return ConfigError(
        f"{group}={choice}: no such choice{meant} {there}",
        key=group, value=choice, choices=known, nearest=near,
    )  # fmt: skip


def check_choices(overrides: Sequence[str]) -> None:
    """Refuses a file of a group that is a part of its choices: its name begins with _."""
    for override in overrides:
        group, _, value = override.partition("=")
        if value.startswith("_") and group in list_groups():
            raise explain_unknown_choice(group, value, list_known_choices(group))


def explain_several_values(override: str) -> ConfigError:
    """Says what a comma may mean: a run for each value, or all of them in one run."""
    key, _, value = override.partition("=")
    together = f"; {key}=[{value}] takes them together" if key in LIST_GROUPS else ""
    return ConfigError(
        f"{override}: several values; add -m to run once with each (a sweep){together}.",
        key=key, value=value,
    )  # fmt: skip


def explain_unknown_key(
    key: str, config_name: str, overrides: Sequence[str], composed: DictConfig | None
) -> ConfigError:
    """Names this project's key for a foreign one, a choice that has it, or the nearest keys."""
    value = find_value(key, overrides) or ""
    if foreign := explain_foreign_name(key, value):
        return foreign
    group, _, rest = key.partition(".")
    owners = [choice for choice in list_known_choices(group) if has_key(group, choice, rest)]
    if rest and owners:
        first = PREFERRED_OWNERS.get(key)
        owners = [first] if first in owners else owners
        chosen = find_value(group, overrides)
        named = f"{group}={chosen}" if chosen else f"the {group} chosen here"
        return ConfigError(
            f"{key}: {named} has no such key; add {' or '.join(f'{group}={o}' for o in owners)}.",
            key=key, value=value, nearest=[f"{group}={owner}" for owner in owners],
        )  # fmt: skip
    near = find_nearest_keys(key, config_name, overrides, composed)
    return ConfigError(
        f"{key}: no such key{format_suggestion(near)}", key=key, value=value, nearest=near
    )


def has_key(group: str, choice: str, key: str) -> bool:
    """Returns whether the file of a choice has this key."""
    content = yaml.safe_load((schema.find_conf_folder() / group / f"{choice}.yaml").read_text())
    for part in key.split("."):
        if not isinstance(content, dict) or part not in content:
            return False
        content = content[part]
    return True


def explain_bad_override(override: str, message: str) -> str:
    """Says why Hydra can't read an override; if a function in it fails, for what reason."""
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


def explain_wrong_value(error: BaseException) -> ConfigError | None:
    """Formats `key: why` for a value of the wrong type."""
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ == "ValidationError":
            key = getattr(cause, "full_key", None)
            value = getattr(cause, "value", None)
            reason = str(cause).splitlines()[0]
            if key and re.search(r"is not a subclass of \w+Config\b", reason):
                return explain_section(key, reason.rpartition("value: ")[2])
            return ConfigError(f"{key}: {reason}", key=key, value=value)
        cause = cause.__cause__
    return None


def explain_section(section: str, value: str) -> ConfigError:
    """Says which keys a section has, one of which was probably meant."""
    known = getattr(schema.Config(), section, None)
    names = [field.name for field in fields(known)] if is_dataclass(known) else []
    meant = f"; did you mean {section}.{names[0]}={value}?" if names[:1] == ["name"] else "."
    return ConfigError(
        f"{section}={value}: {section} holds keys: {', '.join(names)}{meant}",
        key=section, value=value, choices=[f"{section}.{name}" for name in names],
    )  # fmt: skip


def find_nearest_keys(
    key: str, config_name: str, overrides: Sequence[str], composed: DictConfig | None
) -> list[str]:
    """Returns the keys nearest to an unknown one. composed: the config that lacks it, if any."""
    if composed is None:
        composed = compose_choices(config_name, overrides)
    if key.partition(".")[0] != "hydra":
        return find_nearest(key, list_known_keys(composed))
    hydra_keys = flatten_keys(composed.hydra, "hydra.")
    search = "hydra/sweeper=optuna"
    of_search = set(list_hydra_keys(config_name, [search])) - set(hydra_keys)
    nearest = find_nearest(key, [*hydra_keys, *of_search])
    if nearest and nearest[0] in of_search:
        return [f"{search} {nearest[0]}"]
    return nearest


def list_hydra_keys(config_name: str, choices: list[str]) -> list[str]:
    return flatten_keys(compose(config_name, choices, with_hydra=True).hydra, "hydra.")


def list_known_choices(group: str) -> list[str]:
    return list_choices([schema.find_conf_folder()], group)


def explain_key_of_none(config_name: str, overrides: Sequence[str]) -> ConfigError:
    """Says that a key belongs to a section whose choice is none."""
    composed = compose_choices(config_name, overrides)
    for override in overrides:
        part = parse_key(override).partition(".")[0]
        if "." in parse_key(override) and part in composed and composed[part] is None:
            others = [f"{part}={choice}" for choice in list_known_choices(part) if choice != "none"]
            return ConfigError(
                f"{override}: {part} is none here, which has no keys; leave it out, or set "
                f"{' or '.join(others)}.",
                key=parse_key(override), value=override.partition("=")[2], nearest=others,
            )  # fmt: skip
    return ConfigError("a key is set of a part that is none; leave it out.")


def explain_wrong_choice(overrides: Sequence[str]) -> ConfigError:
    """Says that an override gives a group a number, or nothing, instead of a choice."""
    for override in overrides:
        group, _, value = override.partition("=")
        if group in list_groups() and not isinstance(yaml.safe_load(value), str | list):
            known, meant = list_known_choices(group), ""
            if value in ("null", "~", ""):
                meant = f"; did you mean {group}=none?" if "none" in known else ""
            elif keys := [key for key in vars(schema.Config) if key.startswith(f"{group}_")]:
                meant = f"; did you mean {keys[0]}={value}?"
            return explain_unknown_choice(group, value, known, meant)
    return ConfigError("a group was given something that is no choice of it.")


def list_known_keys(composed: DictConfig) -> list[str]:
    """Returns every key that can be set in this config, and the groups."""
    keys = [key for key in flatten_keys(composed, "") if key.partition(".")[0] != "hydra"]
    return [*list_groups(), *keys]


def compose_choices(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """Composes the config with the given choices and added keys, and no other overrides."""
    groups = list_groups()
    chosen = [
        override
        for override in overrides
        if override.startswith(("+", "hydra/")) or override.partition("=")[0] in groups
    ]
    return compose(config_name, chosen, with_hydra=True)


def compose(config_name: str, chosen: list[str], *, with_hydra: bool = False) -> DictConfig:
    """Composes the config with these overrides, or without them if they are wrong."""
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
