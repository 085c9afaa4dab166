"""A reward for mathematical answers in any notation."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import Future, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

from grpo.data.answers import extract_tagged_answer
from grpo.rewards.option_checks import require_at_least, require_positive
from grpo.types import Failure, Sample
from grpo.verifiers import latex

if TYPE_CHECKING:
    from pebble import ProcessPool


class Math:
    """1 if math-verify finds a completion's answer equal to the gold answer, else 0.

    The answer is read from the last `<answer>…</answer>`; without it, from the last `\\boxed{…}`;
    without that, it is the last one that math-verify finds in the text. The gold answer may be
    plain (`1,234`, `\\frac{1}{2}`, `x=2`), between dollars or boxed. If it can't be read, like a
    word, the reward does not apply. An answer that takes longer than `seconds` to compare, or whose
    worker dies, gives a failure; the other answers of its batch are compared anyway.

    https://github.com/huggingface/Math-Verify, in processes because sympy can't be interrupted.

    Args:
        seconds: time limit of one answer, in wall time.
        workers: processes; they start at the first call and run until `close` or the end.
    """

    concurrent = True

    def __init__(self, seconds: float = 5.0, workers: int = 2) -> None:
        require_positive(seconds=seconds)
        require_at_least(1, workers=workers)
        self.seconds = seconds
        self.workers = workers
        self.pool: ProcessPool | None = None

    def __call__(self, samples: Sequence[Sample]) -> list[float | Failure | None]:
        pool = self.ensure_pool()
        try:
            futures = [
                pool.schedule(
                    latex.are_same_math,
                    (sample.answer, find_answer_text(sample)),
                    timeout=self.seconds,
                )
                for sample in samples
            ]
        except RuntimeError as error:  # the pool broke after some were scheduled
            return [Failure(f"the pool of workers broke: {error}")] * len(samples)
        return [self.await_result(future) for future in futures]

    def await_result(self, future: Future[bool | None]) -> float | Failure | None:
        from pebble import ProcessExpired

        try:
            same = future.result()
        except TimeoutError:
            return Failure(f"no answer within {self.seconds:g} s")
        except ProcessExpired as error:
            return Failure(f"its worker died, exit code {error.exitcode}")
        except BrokenProcessPool as error:
            return Failure(f"the pool of workers broke: {error}")
        return None if same is None else float(same)

    def ensure_pool(self) -> ProcessPool:
        """Returns the pool; starts one if there is none, or if a worker's death broke it."""
        if self.pool is not None and not self.pool.active:
            self.close()
        if self.pool is None:
            from pebble import ProcessPool  # the extra [math] brings it

            self.pool = ProcessPool(
                max_workers=self.workers,
                initializer=latex.start_worker,
                context=multiprocessing.get_context("spawn"),
            )
        return self.pool

    def close(self) -> None:
        if self.pool is not None:
            self.pool.stop()
            self.pool.join()
            self.pool = None


def find_answer_text(sample: Sample) -> str:
    tagged = extract_tagged_answer(sample.completion)
    return sample.completion if tagged is None else tagged
