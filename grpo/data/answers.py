"""Is this completion right? The gold answer against what the completion says."""

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
    """The text of the last `<answer>…</answer>` (the innermost, where they nest), or None."""
    found = ANSWER_TAG.findall(text)
    return found[-1].strip() if found else None


def extract_boxed_answer(text: str) -> str | None:
    """The content of the last whole `\\boxed{…}`, braces in it and all, or None."""
    found = extract_last_box(text)
    return None if found is None else found.strip()


def extract_likely_answer(text: str) -> str | None:
    """The answer wherever it stands: in a tag, in a box, the last number, or all of the text."""
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
    """What two answers must have in common to be the same one.

    The value of a number; of anything else its text, without case, outer spaces and typography.
    """
    number = parse_number(answer)
    if number is not None:
        return number
    box = BOXED.fullmatch(answer.strip())
    text = box[1] if box else answer
    return unicodedata.normalize("NFC", text.translate(LOOKALIKE_SIGNS).strip().casefold())


def is_same_answer(given: str, gold: str) -> bool:
    """Whether two answers are the same number or, where they aren't numbers, the same text."""
    return normalize_answer(given) == normalize_answer(gold)


def choose_extractor(name: str) -> Callable[[str], str | None]:
    """What reads the answer out of a completion.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in EXTRACTORS:
        raise ConfigError(
            f"dataset.extract={name!r}: use one of {', '.join(EXTRACTORS)}"
            f"{suggest_names(name, EXTRACTORS)}"
        )
    return EXTRACTORS[name]


def verify_answer(gold: str, read: Callable[[str], str | None], completion: str) -> float:
    """1 where the answer that is read out of a completion equals the gold answer, else 0."""
    given = read(completion)
    return float(given is not None and is_same_answer(given, gold))


def answered(
    question: str,
    gold: str,
    extract: str = "tag",
    columns: Mapping[str, Any] = MappingProxyType({}),
    messages: tuple[Mapping[str, str], ...] = (),
) -> Example:
    """An example with a gold answer.

    extract: where a completion's answer stands: in the last `tag` (`<answer>`), `boxed`, the last
        `number`, all of the `text`, or `lenient`: the first of these that there is.
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
