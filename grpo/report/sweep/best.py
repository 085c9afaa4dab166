"""best.yaml: the best setting as an experiment file, which repeats the same run."""

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

EXCLUDED_KEYS = ("sweep", "sweep_dir", "resume", "name", "tracking")  # don't change results


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
    """Builds SWEEP/experiment/NAME.yaml, and the command that runs it.

    If the sweep's --config-dir has an experiment of this name, it is NAME_2.yaml, and so on. A file
    can't delete keys, so deletions (~reward.answer) go into the command.

    Args:
        overrides: of the best job, with its seed.
        why: a comment at the top of the file.
        config_dir: the --config-dir that the sweep was started with.
    """
    name = find_free_name(Path(config_dir), name) if config_dir else name
    file = sweep / "experiment" / f"{name}.yaml"
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    deleted = [quote(f"~{override.key_or_group}") for override in parsed if override.is_delete()]
    if deleted:
        why += f"\nThe command that runs it also needs {' '.join(deleted)}."
    comment = "\n".join(f"# {line}" for line in why.splitlines())
    content = f"# @package _global_\n{comment}\n{format_experiment(parsed, config_dir)}"
    where = ["--config-dir", quote(config_dir or str(sweep))]
    if config_dir is not None:
        where.append(quote(f"hydra.searchpath=[file://{sweep.absolute()}]"))
    return BestSetting(file, content, " ".join(["grpo", *where, f"experiment={name}", *deleted]))


def find_free_name(config_dir: Path, name: str) -> str:
    taken = {file.stem for file in (config_dir / "experiment").glob("*.yaml")}
    names = chain([name], (f"{name}_{n}" for n in count(2)))
    return next(name for name in names if name not in taken)


def format_experiment(overrides: Sequence[Override], config_dir: str | None) -> str:
    """Formats overrides as YAML: choices of groups as a defaults list, values as keys."""
    folders = [find_conf_folder(), *([Path(config_dir)] if config_dir else [])]
    base: list[Any] = []
    defaults: list[Any] = []  # overrides of defaults, which Hydra requires to be last
    keys: dict[str, Any] = {}
    sweep_first = sorted(overrides, key=lambda override: override.key_or_group != "sweep")
    for override in sweep_first:
        name = override.key_or_group
        if name == "sweep":
            apply_sweep_file(str(override.value()), folders, defaults, keys)
        if name.partition(".")[0] in EXCLUDED_KEYS or override.is_delete():
            continue
        if any((folder / name).is_dir() for folder in folders):
            if name == "experiment":
                chosen = override.value()  # one, or [several], or null
                base += chosen if isinstance(chosen, list) else [chosen] if chosen else []
            else:
                defaults.append({f"override /{name}": override.value()})
            continue
        set_key(keys, name, override.value())
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
    """Adds the settings in a file of conf/sweep/ that are the experiment's, not the sweep's."""
    files = [folder / "sweep" / f"{choice}.yaml" for folder in folders]
    file = next((file for file in reversed(files) if file.is_file()), None)
    content = (yaml.safe_load(file.read_text()) if file else None) or {}
    defaults += [entry for entry in content.pop("defaults", []) if "hydra" not in str(entry)]
    content.pop("hydra", None)
    keys |= content
