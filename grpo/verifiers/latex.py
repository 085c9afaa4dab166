"""Decides whether two answers are the same mathematics, by math-verify. Runs only in worker
processes: sympy may compute a single power for ever, and only its process can be stopped."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import re
import resource
import signal
import sys
import threading
from functools import lru_cache
from multiprocessing import connection
from typing import Any

from grpo.verifiers.numbers import LOOKALIKE_SIGNS, SUPERSCRIPT_DIGITS, split_vulgar_fractions

WORKER_MEMORY_MB = 4096  # limit on a worker's address space; beyond it, an answer is unreadable

MAX_CHARACTERS = 4000  # read from the end of an answer; the time grows with the square
TAG = re.compile(r"</?[A-Za-z][A-Za-z_]{2,}>")
DELIMITED = re.compile(r"\$[^$]+\$|\\\(|\\\[")
NUMBER = re.compile(r"[-+]?\$?(?:\d{1,3}(?:[, ]\d{3})+|\d+)?(?:\.\d*)?%?")
TEXT = re.compile(r"\\(?:text|textbf|mathrm|begin|end)\s*\{([^{}]*)\}")
PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}|(?<=\d )[A-Za-z]{2}")  # 5 km, but not 2xy
BARE_COMMAND = re.compile(r"(?<![\\A-Za-z])(?=(?:pi|sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp)\b)")
ROOT = re.compile(r"\\?sqrt\(([^()]*)\)")
# Without the long dashes, which are more often punctuation than a minus.
SIGNS = {sign: plain for sign, plain in LOOKALIKE_SIGNS.items() if sign not in (0x2014, 0x2015)} | {
    ord("∞"): r"\infty "
}
ROOT_SIGN = re.compile(r"√(?:\(([^()]*)\)|(\d+|[a-z]))")
# Not m², a unit.
SUPERSCRIPT_SIGNS = re.compile(r"(?<=[\d)}a-ln-z])(?<![A-Za-z]{2})[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
THOUSANDS = re.compile(r"(?<![\w.,])(?<!\d )\d{1,3}(?:(?: |\\[,; ])\d{3})+(?![\d/])(?! \d)")
CONJUNCTION = re.compile(
    r"(?<=[\d)}\]])\s{0,9},?\s{0,9}(?:\\text\{\s*(?:and|or)\s*\}|\band\b|\bor\b)\s*(?=[-\d(\\\[{])"
)
WHOLE_FORMULA = re.compile(r"\$[^$]*\$|\\\(.*\\\)|\\\[.*\\\]", re.DOTALL)
INDEX = re.compile(r"[_^](?:\d|\{[^{}]*\d)")
BOX = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
BETWEEN_BOXES = re.compile(r"(?:[\s$,;&{}]|\\[\[\](),;: ]|\\q?quad|\\text|and|or)*")
DOLLARS = re.compile(r"(\$\$?)([^$]+)(\$\$?)")
CLOSING_PUNCTUATION = re.compile(r"\s{0,9}(?<![.\\])[.,;:]\s{0,9}(?=\\[)\]])")
MIXED_NUMBER = re.compile(r"(?<![\w./,)}])(?<!\d )(\d{1,9}) (\d{1,9})/(\d{1,9})(?![\d/.]\d)")
SCIENTIFIC = re.compile(r"(?<=\d)[eE](?=[-+]?\d)([-+]?\d+)")


def are_same_math(gold: str, given: str) -> bool | None:
    """Returns whether an answer equals the gold answer; None if the gold answer can't be read.

    An answer that math-verify can't read or compare doesn't equal the gold answer.
    """
    from math_verify import verify

    golds = read_gold(gold)
    if not golds:
        return None
    if normalize_text(given) == normalize_text(gold):
        return True
    options = {"allow_set_relation_comp": True, "timeout_seconds": None}  # 1 < x < 2 is (1, 2)
    return bool(verify(list(golds), parse_answer(given), **options))


def normalize_text(text: str) -> str:
    """Removes `\\text{…}`, dollars and case, so that East equals `$\\text{east}$`."""
    return TEXT.sub(r"\1", text).strip(" $\n").casefold()


@lru_cache(maxsize=4096)  # a gold answer is used for a whole group, again in every epoch
def read_gold(gold: str) -> tuple[Any, ...]:
    return tuple(parse_answer(gold))


def parse_answer(text: str) -> list[Any]:
    """Parses a text's answer for sympy: its last boxes, or else the last answer in it."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    plain = TAG.sub(" ", text).rpartition("####")[2].strip()  # GSM8K's mark
    answers = extract_last_boxes(plain)
    answer = ", ".join(dict.fromkeys(answers)) if answers else plain
    answer = delimit_math(convert_signs(answer[-MAX_CHARACTERS:]))
    # If sympy can't read an expression, math-verify takes a number out of it. That is a good guess
    # if it has one number (5 cm), but wrong for a part of an expression, as in \sum_{k=0}^n.
    in_parts = len(re.findall(r"\d+", answer)) > 1 or INDEX.search(answer)
    whole = WHOLE_FORMULA.fullmatch(answer) and "\n" not in answer.strip("$\n ")
    kinds = [LatexExtractionConfig()] + ([] if whole and in_parts else [ExprExtractionConfig()])
    # No time limits of math-verify's, which use signal.alarm; the process has one.
    return list(parse(answer, kinds, parsing_timeout=None))


def extract_last_box(text: str) -> str | None:
    """Returns the content of the last complete `\\boxed{…}`, inner braces included, or None."""
    found = find_boxes(text)
    return found[-1][2] if found else None


def extract_last_boxes(text: str) -> list[str]:
    """Returns the contents of the last complete boxes that have at most an "and" between them."""
    *before, (start, _, content) = find_boxes(text) or [(0, 0, "")]
    contents = [content]
    for begin, end, content in reversed(before):
        if not BETWEEN_BOXES.fullmatch(text, end, start):
            break
        start = begin
        contents.append(content)
    plain = (re.sub(r"(?<!\\)\$", "", content).strip() for content in reversed(contents))
    return [content for content in plain if content]


def find_boxes(text: str) -> list[tuple[int, int, str]]:
    """Returns start, end and content of each complete `\\boxed{…}`, ordered by start."""
    opened: list[re.Match[str] | None] = []  # None: a brace that opens no box
    found = []
    for mark in BOX.finditer(text):
        if mark[0] == "}" and opened:
            box = opened.pop()
            if box is not None:
                found.append((box.start(), mark.end(), text[box.end() : mark.start()]))
        elif mark[0] == "{" or mark["box"]:
            opened.append(mark if mark["box"] else None)
    return sorted(found)


def convert_signs(text: str) -> str:
    """Replaces signs by those that math-verify knows; joins thousands that spaces separate."""
    text = split_vulgar_fractions(text.translate(SIGNS))
    text = ROOT_SIGN.sub(r"\\sqrt{\1\2}", text)
    text = SUPERSCRIPT_SIGNS.sub(
        lambda signs: "^{" + signs[0].translate(SUPERSCRIPT_DIGITS) + "}", text
    )
    text = THOUSANDS.sub(lambda number: re.sub(r"\D", "", number[0]), text)
    text = DOLLARS.sub(lambda span: span[1] + strip_punctuation(span[2]) + span[3], text)
    return MIXED_NUMBER.sub(convert_mixed_number, CLOSING_PUNCTUATION.sub("", text))


def strip_punctuation(text: str) -> str:
    """Removes the punctuation of the sentence around a formula; an ellipsis stays."""
    text = text.rstrip()
    is_stop = text.endswith((".", ",", ";", ":")) and not text.endswith(("..", "\\,", "\\;", "\\:"))
    return text[:-1].rstrip() if is_stop else text


def convert_mixed_number(mixed: re.Match[str]) -> str:
    """Writes 2 1/2 as 5/2; math-verify would read a product, or only the fraction."""
    whole, above, below = (int(part) for part in mixed.groups())
    return f"{whole * below + above}/{below}" if above < below else mixed[0]


def delimit_math(text: str) -> str:
    """Puts bare LaTeX between dollars; without them, math-verify reads only its numbers.

    Plain numbers and prose stay: `10 000` would be a product, and words would be variables.
    """
    text = text.strip().replace(r"\%", "%").replace(r"\$", "")
    if not DELIMITED.search(text):
        text = strip_punctuation(text)
    bare = CONJUNCTION.sub(", ", BARE_COMMAND.sub(r"\\", ROOT.sub(r"\\sqrt{\1}", text)))
    if DELIMITED.search(text) or NUMBER.fullmatch(text) or PROSE.search(TEXT.sub("", bare)):
        return text
    return "$" + SCIENTIFIC.sub(r" \\cdot 10^{\1}", bare) + "$"


def start_worker() -> None:
    """Prepares a worker: imports slow modules, limits its memory, ends it with its parent."""
    import math_verify  # noqa: F401

    logging.disable(logging.CRITICAL)  # math-verify warns that its time limits are off
    parent = multiprocessing.parent_process()
    assert parent is not None
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY_MB << 20, WORKER_MEMORY_MB << 20))
        # The kernel kills the worker when the pipe from its parent breaks, even during one long
        # multiplication, when no Python code can run.
        pipe = parent.sentinel
        fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    threading.Thread(target=exit_with_parent, args=(parent.sentinel,), daemon=True).start()


def exit_with_parent(pipe: int) -> None:
    """Exits when the parent ends: on other systems, and on Linux if it ended early."""
    connection.wait([pipe])
    os._exit(1)
