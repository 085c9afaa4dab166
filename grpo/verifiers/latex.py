"""Whether two answers are the same mathematics, by math-verify. Runs in worker processes only:
sympy may take for ever over a single power, and then only its process can be stopped."""

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

MEMORY_MB = 4096  # of a worker's address space; past it an answer is as unreadable as any other

TAG = re.compile(r"</?[A-Za-z][A-Za-z_]{2,}>")
DELIMITED = re.compile(r"\$[^$]+\$|\\\(|\\\[")
NUMBER = re.compile(r"[-+]?\$?(?:\d{1,3}(?:[, ]\d{3})+|\d+)?(?:\.\d*)?%?")
TEXT = re.compile(r"\\(?:text|textbf|mathrm|begin|end)\s*\{([^{}]*)\}")
PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}|(?<=\d )[A-Za-z]{2}")  # 5 km, but not 2xy
COMMAND = re.compile(r"(?<![\\A-Za-z])(?=(?:pi|sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp)\b)")
ROOT = re.compile(r"\\?sqrt\(([^()]*)\)")
SCIENTIFIC = re.compile(r"(?<=\d)[eE](?=[-+]?\d)([-+]?\d+)")


def same(gold: str, given: str) -> bool | None:
    """Whether an answer equals the gold one; None where the gold one says nothing readable.

    What math-verify can't read or compare in an answer is not the gold answer.
    """
    from math_verify import verify

    golds = read_gold(gold)
    if not golds:
        return None
    if letters(given) == letters(gold):
        return True
    return bool(verify(list(golds), read(given), timeout_seconds=None))


def letters(text: str) -> str:
    """A text without `\\text{…}`, dollars and case: East is `$\\text{east}$`."""
    return TEXT.sub(r"\1", text).strip(" $\n").casefold()


@lru_cache(maxsize=4096)  # one gold answer meets a whole group, and comes back every epoch
def read_gold(gold: str) -> tuple[Any, ...]:
    return tuple(read(gold))


def read(text: str) -> list[Any]:
    """A text's answer in sympy: what its last `\\boxed{…}` holds, without one the last in it."""
    from math_verify import parse

    plain = TAG.sub(" ", text).strip()
    answer = boxed(plain)
    # math-verify has its own time limits, by signal.alarm; here the process has one.
    return list(parse(as_math(plain if answer is None else answer), parsing_timeout=None))


def boxed(text: str) -> str | None:
    """What the last whole `\\boxed{…}` holds, braces inside it included."""
    start = len(text)
    while (start := text.rfind(r"\boxed{", 0, start)) >= 0:
        depth = 0
        for position in range(start + len(r"\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start + len(r"\boxed{") : position]
    return None


def as_math(text: str) -> str:
    """Puts bare LaTeX between dollars, without which math-verify sees only the numbers in it.

    Plain numbers and prose are left: `10 000` would be a product, and words would be variables.
    """
    text = text.strip().replace(r"\%", "%").replace(r"\$", "")
    bare = COMMAND.sub(r"\\", ROOT.sub(r"\\sqrt{\1}", text))
    if DELIMITED.search(text) or NUMBER.fullmatch(text) or PROSE.search(TEXT.sub("", bare)):
        return text
    return "$" + SCIENTIFIC.sub(r" \\cdot 10^{\1}", bare) + "$"


def start_worker() -> None:
    """Readies a worker: imports what is slow, limits memory, and dies with its parent."""
    import math_verify  # noqa: F401

    logging.disable(logging.CRITICAL)  # math-verify warns of the time limits that are off
    parent = multiprocessing.parent_process()
    assert parent is not None
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MB << 20, MEMORY_MB << 20))
        # The kernel kills the worker when the pipe from its parent breaks, even in the middle of
        # one long multiplication, which would let no Python code run.
        pipe = parent.sentinel
        fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    threading.Thread(target=leave_with, args=(parent.sentinel,), daemon=True).start()


def leave_with(pipe: int) -> None:
    """Elsewhere a thread sees to it, and on Linux where the parent was dead before we asked."""
    connection.wait([pipe])
    os._exit(1)
