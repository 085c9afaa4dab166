"""Reads the keys of a YAML file with the comments that explain them, which a parser drops."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LINE = re.compile(
    r"(?P<indent>\s*)(?P<key>[\w-]+):(?P<value>(\s+('[^']*'|\"[^\"]*\"|[^#\s'\"]+))*)"
)
COMMENT = re.compile(r"(?:^|\s)# (?P<text>.*)$")


@dataclass(frozen=True)
class Key:
    """One key of a file: what it is called on the command line, and what there is to say of it."""

    name: str
    default: str
    meaning: str


def read_keys(file: Path, prefix: str) -> list[Key]:
    """Reads the keys of a YAML file, with the comments beside, below or before each."""
    keys: list[Key] = []
    path: list[tuple[int, str]] = []  # the keys around a line, with their indents
    before: list[str] = []  # comment lines that come before a key
    column = -1  # of the comment beside the last key: one right below continues it
    content, skipped = yaml.safe_load(file.read_text()) or {}, False
    for line in file.read_text().splitlines():
        comment = COMMENT.search(line)
        if comment and not line[: comment.start("text") - 2].strip():
            if keys and comment.start("text") == column:
                keys[-1] = Key(
                    keys[-1].name, keys[-1].default, f"{keys[-1].meaning} {comment['text']}"
                )
            elif line.startswith(" "):
                before.append(comment["text"])
            continue
        code = line[: comment.start()] if comment else line
        match = LINE.fullmatch(code.rstrip()) or re.fullmatch(
            r"(?P<indent>\s*)(?P<key>[\w-]+):(?P<value>\s.*)", code.rstrip()
        )
        if not match:
            continue
        indent, key = len(match["indent"]), match["key"]
        if indent == 0:
            skipped = key == "defaults"
        if skipped:
            continue
        path = [(outer, name) for outer, name in path if outer < indent] + [(indent, key)]
        names = [name for _, name in path]
        text = " ".join([*before, *([comment["text"]] if comment else [])])
        before, column = [], comment.start("text") if comment else -1
        value = content
        try:
            for name in names:
                value = value[name]
        except (KeyError, TypeError, IndexError):
            continue  # within a list, or text
        if key == "_target_":
            continue
        is_section = isinstance(value, dict) and bool(value) and not match["value"].strip()
        keys.append(
            Key(
                f"{prefix}{'.'.join(names)}{'.*' if is_section else ''}",
                format_value(match, value),
                text,
            )
        )
    return keys


def format_value(match: re.Match[str], value: Any) -> str:
    """Formats a default as it stands in the file, and a list of several lines in one."""
    written = match["value"].strip()
    if isinstance(value, dict) and not written:
        return ""
    if written and not written.startswith((">", "|")):
        return f"`{written}`"
    dumped = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return f"`{dumped.removesuffix('...').strip()}`"


def read_comment(file: Path) -> str:
    """Reads the comment at the head of a file."""
    lines: list[str] = []
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#").strip()
        if text.startswith("@"):
            continue
        if lines and re.search(r"=\S+\w$", lines[-1]) and text[:1].isupper():
            lines[-1] += "."
        lines.append(text)
    return " ".join(lines)
