"""Is this completion right? The gold answer against what the completion says."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from functools import partial

from grpo.errors import ConfigError

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


def whole_text(text: str) -> str | None:
    return text.strip() or None


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "tag": tagged_answer,
    "number": last_number,
    "text": whole_text,
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


class AnswerVerifier:
    """1 where the answer extracted from a completion equals the gold answer, else 0.

    extract: `tag` reads the last `<answer>` tag, `number` the last number, `text` all of it.
    """

    def __init__(self, extract: str) -> None:
        self.extract = extractor(extract)

    def score(self, gold: str, completion: str) -> float:
        given = self.extract(completion)
        return float(given is not None and same_answer(given, gold))

    def bind(self, gold: str) -> Callable[[str], float]:
        return partial(self.score, gold)
