"""best.yaml: the best setting as an experiment file, which gives the same run again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from shlex import quote
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from grpo.config.schema import find_conf_folder

EXCLUDED_KEYS = (
    "sweep",
    "sweep_dir",
    "resume",
    "name",
    "tracking",
)  # change nothing that is measured


@dataclass(frozen=True)
class BestSetting:
    """The best setting as a file, and the command that runs it."""

    file: Path
    content: str
    command: str

    def write(self) -> None:
        self.file.parent.mkdir(exist_ok=True)
        self.file.write_text(self.content)


def build_best_setting(
    sweep: Path, overrides: Sequence[str], why: str, config_dir: str | None, name: str = "best"
) -> BestSetting:
    """SWEEP/experiment/NAME.yaml, and the command that runs it.

    Where the sweep's own experiments have one of this name, it is NAME_2.yaml, and so on. What an
    override takes away (~reward.answer) a file can't: that goes into the command.

    Args:
        overrides: those of the best job, its seed among them.
        own_configs: the --config-dir that the sweep was started with.
    """
    name = find_free_name(Path(config_dir), name) if config_dir else name
    file = sweep / "experiment" / f"{name}.yaml"
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    deleted = [quote(f"~{one.key_or_group}") for one in parsed if one.is_delete()]
    if deleted:
        why += f"\nThe command that runs it must say {' '.join(deleted)} too."
    comment = "\n".join(f"# {line}" for line in why.splitlines())
    content = f"# @package _global_\n{comment}\n{format_experiment(parsed, config_dir)}"
    where = ["--config-dir", quote(config_dir or str(sweep))]
    if config_dir is not None:
        where.append(quote(f"hydra.searchpath=[file://{sweep.absolute()}]"))
    return BestSetting(file, content, " ".join(["grpo", *where, f"experiment={name}", *deleted]))


def find_free_name(config_dir: Path, name: str) -> str:
    taken = {file.stem for file in (config_dir / "experiment").glob("*.yaml")}
    names = chain([name], (f"{name}_{n}" for n in count(2)))
    return next(own for own in names if own not in taken)


def format_experiment(overrides: Sequence[Override], config_dir: str | None) -> str:
    """Overrides as YAML: choices of groups as a defaults list, values as keys."""
    folders = [find_conf_folder(), *([Path(config_dir)] if config_dir else [])]
    base: list[Any] = []
    defaults: list[Any] = []  # those that override, which Hydra wants last
    keys: dict[str, Any] = {}
    study_first = sorted(overrides, key=lambda one: one.key_or_group != "sweep")
    for one in study_first:
        name = one.key_or_group
        if name == "sweep":
            apply_sweep_file(str(one.value()), folders, defaults, keys)
        if name.partition(".")[0] in EXCLUDED_KEYS or one.is_delete():
            continue
        if any((folder / name).is_dir() for folder in folders):
            if name == "experiment":
                chosen = one.value()  # one, or [several], or null
                base += chosen if isinstance(chosen, list) else [chosen] if chosen else []
            else:
                defaults.append({f"override /{name}": one.value()})
            continue
        set_key(keys, name, one.value())
    whole = {"defaults": [*base, "_self_", *defaults], **keys}
    return str(yaml.safe_dump(whole, sort_keys=False, allow_unicode=True))


def set_key(keys: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        keys = keys.setdefault(section, {})
    keys[last] = value


def apply_sweep_file(
    choice: str, folders: Sequence[Path], defaults: list[Any], keys: dict[str, Any]
) -> None:
    """What a file in conf/sweep/ says of the experiment, and not of the sweep."""
    files = [folder / "sweep" / f"{choice}.yaml" for folder in folders]
    file = next((file for file in reversed(files) if file.is_file()), None)
    content = (yaml.safe_load(file.read_text()) if file else None) or {}
    defaults += [one for one in content.pop("defaults", []) if "hydra" not in str(one)]
    content.pop("hydra", None)
    keys |= content
