"""Scores answers that have to be evaluated, in a process that can be stopped.

Some tasks of reasoning-gym pass an answer to sympy. An answer with 9**9**9 would keep this process
busy for ever, in a multiplication that no signal interrupts.
"""

from __future__ import annotations

import atexit
import multiprocessing
import re
from collections.abc import Mapping
from concurrent.futures import TimeoutError
from functools import cache
from typing import TYPE_CHECKING, Any

from grpo.types import Failure
from grpo.verifiers.latex import start_worker

if TYPE_CHECKING:
    from pebble import ProcessPool

SCORING_SECONDS = 5.0  # time limit of one answer, in wall time
# An expression whose evaluation may never end.
ENDLESS = re.compile(r"\*\*|\^|!|<<|[A-Za-z]{3,}\s*\(|\d[eE]\+?\d{3}")


def score_answer(problems: Any, answer: str, entry: Mapping[str, Any]) -> float | Failure:
    """Returns a task's own score of an answer; a Failure if it is late or its worker dies."""
    if not ENDLESS.search(answer):
        return float(problems.score_answer(answer, entry))
    from pebble import ProcessExpired  # the extra [gym] brings it

    future = open_pool().schedule(
        score_in_worker, (problems, answer, entry), timeout=SCORING_SECONDS
    )
    try:
        return float(future.result())
    except TimeoutError:
        return Failure(f"no verdict within {SCORING_SECONDS:g} s")
    except ProcessExpired as error:
        return Failure(f"its worker died, exit code {error.exitcode}")


def score_in_worker(problems: Any, answer: str, entry: Mapping[str, Any]) -> float:
    return float(problems.score_answer(answer, entry))


def start_scoring_worker() -> None:
    """Imports slow modules before the time of the first answer begins."""
    import reasoning_gym  # noqa: F401

    start_worker()


@cache
def open_pool() -> ProcessPool:
    """Starts the one worker process at the first call; it ends with this process."""
    from pebble import ProcessPool

    context = multiprocessing.get_context("spawn")
    pool = ProcessPool(max_workers=1, initializer=start_scoring_worker, context=context)
    atexit.register(close_pool, pool)
    return pool


def close_pool(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()
