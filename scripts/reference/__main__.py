#!/usr/bin/env python
"""Writes the parts of docs/ that repeat conf/: python scripts/reference [--check]

A page marks such a part with <!-- generated: NAME --> and <!-- end -->. The keys, their defaults
and their meanings come from the YAML files and their comments, the types from the schema and from
the classes that the files name; meanings.yaml has meanings for keys whose comment is
short. --check writes nothing and fails where a page is out of date.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from key_types import find_type, guess_type
from yaml_keys import Key, read_comment, read_keys

from grpo.config import schema

ROOT = Path(__file__).resolve().parents[2]
CONF, DOCS = ROOT / "conf", ROOT / "docs"
MARK = re.compile(r"(<!-- generated: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
ARXIV = re.compile(r"\b(\d{4}\.\d{5})\b")

TEXTS: dict[str, dict[str, str]] = yaml.safe_load(
    Path(__file__).with_name("meanings.yaml").read_text()
)


def main() -> None:
    schema.register_schema()
    check, stale = "--check" in sys.argv, []
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        new = fill_page(text)
        if new != text:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(new, encoding="utf-8")
    if stale and check:
        raise SystemExit(f"out of date, run python scripts/reference: {', '.join(stale)}")
    print("\n".join(stale) or "every page is up to date")


def fill_page(text: str) -> str:
    """Returns a page with its generated parts built again."""
    return MARK.sub(lambda m: f"{m[1]}\n{GENERATED[m[2]]().strip()}\n\n{m[3]}", text)


def take_first_sentence(text: str) -> str:
    return re.split(r"(?<!Dr\.)(?<=[.?]) (?=[A-Z])", text, maxsplit=1)[0]


def link_papers(text: str) -> str:
    """As Markdown: papers and pages are links, and tags are text."""
    text = text.replace("<", "&lt;").replace("|", "\\|")
    text = re.sub(r"\bdocs/(\w+)\.md", r"[\1](../\1.md)", text)
    return ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", text)


def format_table(keys: Iterable[Key], file: Path, known: Mapping[str, str]) -> list[str]:
    """The rows of a file's keys. known: meanings from other files of its group."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        leaf = key.name.rpartition(".")[2]
        fallback = re.sub(r"^reward\.\w+\.", "reward.*.", key.name)
        meaning = (
            TEXTS["meanings"].get(key.name)
            or TEXTS["meanings"].get(fallback)
            or key.meaning
            or known.get(key.name)
            or ""
        )
        if leaf == "*" and not meaning:
            continue
        kind = "" if leaf == "*" else find_type(key.name, file, leaf) or guess_type(key.default)
        cells = [f"`{key.name}`", kind, key.default, link_papers(meaning)]
        rows.append(f"| {' | '.join(cells)} |")
    return rows if len(rows) > 2 else []


def build_keys() -> str:
    """Every key of every file, group by group."""
    parts = ["## Config", "", "`conf/config.yaml`: the keys of every experiment.", ""]
    config = CONF / "config.yaml"
    parts += format_table(read_keys(config, ""), config, {})
    parts += [
        "",
        "The groups, with their defaults:",
        "",
        "| group | default | what it is |",
        "|---|---|---|",
    ]
    for group, choice in re.findall(r"^  - (\w+): (\w+)", config.read_text(), re.MULTILINE):
        if group != "hydra":
            parts.append(f"| `{group}` | `{choice}` | {TEXTS['groups'].get(group, '')} |")
    parts += ["", "Only `grpo eval` has this key:", ""]
    keys = [key for key in read_keys(CONF / "eval.yaml", "") if not key.name.startswith("hydra")]
    parts += format_table(keys, CONF / "eval.yaml", {})
    for group in sorted(p.name for p in CONF.iterdir() if p.is_dir() and p.name != "hydra"):
        parts += [
            "",
            f"## {group.capitalize() if group != 'kl' else 'KL'}",
            "",
            *build_group(group),
        ]
    parts += ["", "## hydra/sweeper", "", *build_group("hydra/sweeper")]
    parts += ["", "## hydra/launcher", "", *build_launchers()]
    return "\n".join(parts)


def build_group(group: str) -> Iterator[str]:
    """A section for each choice of a group."""
    files = sorted(
        (CONF / group).rglob("*.yaml"),
        key=lambda f: (f.parent != CONF / group, f.stem != "_base", f.stem),
    )
    known: dict[str, str] = {}
    for file in files:
        known |= {k.name: k.meaning for k in read_keys(file, find_prefix(file)) if k.meaning}
    shown: set[Key] = set()
    for file in files:
        own_prefix = find_prefix(file)
        name = f"{'/'.join(file.parent.relative_to(CONF).parts)}={file.stem}"
        yield from [f"### {'Keys of every ' + group if file.stem == '_base' else f'`{name}`'}", ""]
        yield from [link_papers(read_comment(file) or TEXTS["files"].get(name, "")), ""]
        keys = read_keys(file, own_prefix)
        if "@package _global_" in file.read_text():
            sets = " ".join(
                f"`{k.name.removeprefix(own_prefix)}={k.default.strip('`')}`"
                for k in keys
                if k.default
            )
            yield from ([f"Sets {sets}", ""] if sets and file.stem != "none" else [])
            continue
        if group == "device":
            keys = [key for key in keys if key not in shown]
            shown |= set(keys)
            yield from ["The other keys as above.", ""] if file.stem != "auto" else []
        bases = re.search(r"^defaults: \[(\w+),", file.read_text(), re.MULTILINE)
        if bases:
            base = f"every {group}" if bases[1] == "_base" else f"`{group}={bases[1]}`"
            yield from [f"Has every key of {base}, and sets:", ""]
        yield from format_table(keys, file, known)
        yield ""
    if group == "reward":
        yield from [
            "### Keys of every reward", "",
            "| key | type | default | meaning |", "|---|---|---|---|",
            "| `reward.NAME._target_` | text | | the dotted path of a function or class |",
            "| `reward.NAME.weight` | number | none for your own: it must be given "
            "| the reward is multiplied by this in the sum |",
            "| `reward.NAME.sources` | list | all "
            "| the sets of a mix that it is for: `+reward.answer.sources=[sums]` |",
        ]  # fmt: skip


def find_prefix(file: Path) -> str:
    """What stands before a file's keys on the command line."""
    return "".join(f"{part}." for part in file.parent.relative_to(CONF).parts)


def build_launchers() -> Iterator[str]:
    """The launchers: this project's file, and what their plugins bring."""
    from hydra_plugins.hydra_joblib_launcher.config import JobLibLauncherConf
    from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf

    file = CONF / "hydra/launcher/slurm.yaml"
    slurm = read_keys(file, "hydra.launcher.")
    yield from [
        "### `hydra/launcher=basic`",
        "",
        "One job after the other: the default. No keys.",
        "",
    ]
    yield from [
        "### `hydra/launcher=slurm`",
        "",
        read_comment(file),
        "",
        *format_table(slurm, file, {}),
        "",
    ]
    for title, plugin, of, left_out in (
        ("The other keys of `hydra/launcher=slurm`", SlurmQueueConf, "submitit's", slurm),
        ("`hydra/launcher=joblib`", JobLibLauncherConf, "joblib.Parallel's", []),
    ):
        yield from [f"### {title}", "", "| key | default | meaning |", "|---|---|---|"]
        for field in fields(plugin):
            name = f"hydra.launcher.{field.name}"
            if field.name == "_target_" or name in {key.name for key in left_out}:
                continue
            default = field.default if isinstance(field.default, str | int | float | None) else "{}"
            default_text = json.dumps(default).strip('"')  # null, true and false as in YAML
            meaning = TEXTS["launchers"].get(field.name, f"{of} option of this name")
            yield f"| `{name}` | `{default_text}` | {meaning} |"
        yield ""
    yield from [
        "### `hydra/launcher=ray`", "",
        "The keys of [Hydra's Ray launcher](https://hydra.cc/docs/plugins/ray_launcher/); "
        "it needs the extra `[ray]`.",
    ]  # fmt: skip


def build_rewards() -> str:
    """A line for each reward."""
    rows = ["| `reward=` | what it does |", "|---|---|"]
    for file in sorted((CONF / "reward").glob("*.yaml")):
        rows.append(f"| `{file.stem}` | {link_papers(read_comment(file))} |")
    return "\n".join(rows)


def build_algorithms() -> str:
    """A line for each algorithm, and its parts."""
    meanings = ["| `algorithm=` | what it is |", "|---|---|"]
    parts = [
        "| `algorithm=` | baseline | scale | ratio | policy loss | averaging | KL |",
        "|---|---|---|---|---|---|---|",
    ]
    losses = {
        re.search(r"_target_: (\S+)", f.read_text())[1]: f.stem  # type: ignore[index]
        for f in (CONF / "algorithm/policy_loss").glob("*.yaml")
    }
    files = sorted((CONF / "algorithm").glob("*.yaml"), key=lambda f: (f.stem != "grpo", f.stem))
    for file in files:
        sentence = take_first_sentence(read_comment(file))
        meanings.append(f"| `{file.stem}` | {link_papers(sentence)} |")
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = [hydra.compose("config", [f"algorithm={file.stem}"]) for file in files]
    for file, cfg in zip(files, composed, strict=True):
        algorithm = cfg.algorithm
        kl = (
            f"`{cfg.kl.estimator}` in the {cfg.kl.within}, weight {cfg.kl_weight:g}"
            if cfg.kl_weight
            else "none"
        )
        cells = [
            algorithm.baseline,
            algorithm.scale,
            algorithm.ratio,
            losses[algorithm.policy_loss._target_],
            algorithm.averaging,
        ]
        parts.append(f"| `{file.stem}` | {' | '.join(f'`{cell}`' for cell in cells)} | {kl} |")
    return "\n".join([*meanings, "", "Their parts:", "", *parts])


GENERATED = {"keys": build_keys, "rewards": build_rewards, "algorithms": build_algorithms}

if __name__ == "__main__":
    main()
