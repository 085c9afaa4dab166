"""Extracts the answer from a completion and compares it with the gold answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from grpo.config.suggest import suggest_names
from grpo.errors import ConfigError
from grpo.types import Example, strip_or_none
from grpo.verifiers.latex import extract_last_box
from grpo.verifiers.numbers import LOOKALIKE_SIGNS, Number, find_last_number, parse_number

ANSWER_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)

BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


def extract_tagged_answer(text: str) -> str | None:
    """Returns the text of the last `<answer>…</answer>` (the innermost if nested), or None."""
    found = ANSWER_TAG.findall(text)
    return found[-1].strip() if found else None


def extract_boxed_answer(text: str) -> str | None:
    """Returns the content of the last complete `\\boxed{…}`, inner braces included, or None."""
    found = extract_last_box(text)
    return None if found is None else found.strip()


def extract_likely_answer(text: str) -> str | None:
    """Returns the first that is found: a tagged or boxed answer, the last number, the text."""
    found = (
        read(text)
        for read in (extract_tagged_answer, extract_boxed_answer, find_last_number, strip_or_none)
    )
    return next((answer for answer in found if answer is not None), None)


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "tag": extract_tagged_answer,
    "boxed": extract_boxed_answer,
    "number": find_last_number,
    "text": strip_or_none,
    "lenient": extract_likely_answer,
}


def normalize_answer(answer: str) -> Number | str:
    """Returns a form in which equal answers are equal.

    For a number its value; for anything else its text, unboxed, without case, outer spaces and
    typographic variants.
    """
    number = parse_number(answer)
    if number is not None:
        return number
    box = BOXED.fullmatch(answer.strip())
    text = box[1] if box else answer
    return unicodedata.normalize("NFC", text.translate(LOOKALIKE_SIGNS).strip().casefold())


def is_same_answer(answer: str, gold: str) -> bool:
    """Returns whether two answers are the same number or, if not numbers, the same text."""
    return normalize_answer(answer) == normalize_answer(gold)


def choose_extractor(name: str) -> Callable[[str], str | None]:
    """Returns the function that extracts the answer from a completion.

    Raises:
        ConfigError: no extractor has this name.
    """
    if name not in EXTRACTORS:
        raise ConfigError(
            f"dataset.extract={name!r}: use one of {', '.join(EXTRACTORS)}"
            f"{suggest_names(name, EXTRACTORS)}",
            key="dataset.extract",
            value=name,
        )
    return EXTRACTORS[name]


def verify_answer(gold: str, read: Callable[[str], str | None], completion: str) -> float:
    """Returns 1 if the answer that `read` extracts equals the gold answer, else 0."""
    answer = read(completion)
    return float(answer is not None and is_same_answer(answer, gold))


def answered(
    question: str,
    gold: str,
    extract: str = "tag",
    columns: Mapping[str, Any] = MappingProxyType({}),
    messages: tuple[Mapping[str, str], ...] = (),
) -> Example:
    """Makes an example that is verified against a gold answer.

    extract: where a completion's answer stands: in the last `tag` (`<answer>`), `boxed`, the last
        `number`, all of the `text`, or `lenient`: the first of these that is found.

    Raises:
        ConfigError: `extract` is none of these.
    """
    read = choose_extractor(extract)
    return Example(
        question=question,
        answer=gold,
        verify=partial(verify_answer, gold, read),
        columns=columns,
        messages=messages,
        extract_answer=read,
        lenient=partial(verify_answer, gold, extract_likely_answer),
    )
