"""Finds the valid names that are nearest to a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def suggest_names(word: str, choices: Iterable[str]) -> str:
    """Formats `; did you mean X or Y?`; "" if no name is near."""
    return format_suggestion(find_nearest(word, choices))


def format_suggestion(near: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(near)}?" if near else ""


def find_nearest(word: str, choices: Iterable[str]) -> list[str]:
    """Returns up to three of the choices, the likeliest first; [] if none is near."""
    alike = {choice: similarity(word, choice) for choice in choices}
    least = max(0.6, max(alike.values(), default=0.0) - 0.1)
    near = [choice for choice, score in alike.items() if score >= least]
    near = [name for name in near if "." not in name or name.rpartition(".")[2] not in near]
    near.sort(key=lambda choice: -alike[choice])
    return near[:3]


def similarity(word: str, choice: str) -> float:
    """Computes the similarity of two names, from 0 to 1; below 0.6, they count as unrelated.

    A key of another section counts a little less.
    """
    (part, _, name), (other_part, _, other) = word.rpartition("."), choice.rpartition(".")
    same_name = difflib.SequenceMatcher(None, other, name).ratio()
    if part == other_part:
        return same_name
    whole = difflib.SequenceMatcher(None, choice, word).ratio()
    return max(whole, 0.9 * same_name if same_name >= 0.75 else 0.0)
