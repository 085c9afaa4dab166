"""Is this completion right? The gold answer against what the completion says."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from functools import partial
from types import MappingProxyType
from typing import Any

from grpo.errors import ConfigError
from grpo.types import Example, whole_text
from grpo.verifiers.latex import boxed

ANSWER_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
# A minus counts where nothing stands before it: 12-5 names 12 and 5. A comma, between thousands.
NUMBER = re.compile(r"(?:(?<![\w)\].])-)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")

THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")


def tagged_answer(text: str) -> str | None:
    """The text of the last `<answer>…</answer>` (the innermost, where they nest), or None."""
    found = ANSWER_TAG.findall(text)
    return found[-1].strip() if found else None


def last_number(text: str) -> str | None:
    """The last number that the text names, or None."""
    found = NUMBER.findall(text)
    return found[-1] if found else None


def boxed_answer(text: str) -> str | None:
    """The content of the last whole `\\boxed{…}`, braces in it and all, or None."""
    found = boxed(text)
    return None if found is None else found.strip()


def likely_answer(text: str) -> str | None:
    """The answer wherever it stands: in a tag, in a box, the last number, or all of the text."""
    found = (read(text) for read in (tagged_answer, boxed_answer, last_number, whole_text))
    return next((answer for answer in found if answer is not None), None)


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "tag": tagged_answer,
    "boxed": boxed_answer,
    "number": last_number,
    "text": whole_text,
    "lenient": likely_answer,
}


def as_number(text: str) -> Decimal | None:
    """`1,234.50`, `$12`, `-7`, `50%` as numbers; None for anything that is not one number."""
    plain = text.strip().replace("$", "").rstrip(".%").strip()
    if "," in plain and not THOUSANDS.fullmatch(plain):
        return None
    try:
        number = Decimal(plain.replace(",", ""))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def same_answer(given: str, gold: str) -> bool:
    """Numbers are compared as numbers, anything else as text without case or outer spaces."""
    given_number, gold_number = as_number(given), as_number(gold)
    if given_number is not None and gold_number is not None:
        return given_number == gold_number
    return given.strip().casefold() == gold.strip().casefold()


def extractor(name: str) -> Callable[[str], str | None]:
    """What reads the answer out of a completion.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in EXTRACTORS:
        raise ConfigError(f"dataset.extract={name!r}: use one of {', '.join(EXTRACTORS)}.")
    return EXTRACTORS[name]


def same_as(gold: str, read: Callable[[str], str | None], completion: str) -> float:
    """1 where the answer that is read out of a completion equals the gold answer, else 0."""
    given = read(completion)
    return float(given is not None and same_answer(given, gold))


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
    read = extractor(extract)
    return Example(
        question=question,
        answer=gold,
        verify=partial(same_as, gold, read),
        columns=columns,
        messages=messages,
        read=read,
        lenient=partial(same_as, gold, likely_answer),
    )
