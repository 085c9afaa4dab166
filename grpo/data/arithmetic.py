"""Generated sums: a data set that needs no download, whose answers are known to be right."""

from __future__ import annotations

import random
import zlib

from grpo.data.source import Source
from grpo.data.verify import AnswerVerifier
from grpo.errors import ConfigError
from grpo.types import Example

OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b}


class Arithmetic(Source):
    """`What is 47 + 38?`, drawn without repetition.

    One problem in ten, chosen by a hash of its text, belongs to evaluation and never to training,
    whatever the sizes and seeds.
    """

    def __init__(
        self,
        size: int,
        eval_size: int,
        digits: int = 2,
        operations: str = "+-",
        extract: str = "tag",
        seed: int = 0,
    ) -> None:
        if not 1 <= digits <= 9:
            raise ConfigError(f"dataset.digits={digits}: use 1 to 9 digits.")
        unknown = sorted(set(operations) - set(OPERATIONS))
        if unknown or not operations:
            raise ConfigError(f"dataset.operations={operations!r}: use some of + and -.")
        self.digits, self.operations, self.seed = digits, sorted(set(operations)), seed
        self.verifier = AnswerVerifier(extract)
        self.size, self.eval_size = size, eval_size

    def train(self) -> list[Example]:
        return self._draw(self.size, "size", held_out=False)

    def evaluation(self) -> list[Example]:
        return self._draw(self.eval_size, "eval_size", held_out=True)

    def _draw(self, size: int, key: str, *, held_out: bool) -> list[Example]:
        if size < 1:
            raise ConfigError(f"dataset.{key}={size}: needs at least 1 problem.")
        rng = random.Random(f"{self.seed} {held_out}")
        drawn: dict[str, Example] = {}
        for _ in range(100 * size):
            problem = self._problem(rng)
            if is_held_out(problem.question) == held_out:
                drawn.setdefault(problem.question, problem)
            if len(drawn) == size:
                return list(drawn.values())
        raise ConfigError(
            f"dataset.{key}={size}: there are only about {len(drawn)} different problems of "
            f"{self.digits} digits; lower it, or raise dataset.digits."
        )

    def _problem(self, rng: random.Random) -> Example:
        a, b = rng.randrange(10**self.digits), rng.randrange(10**self.digits)
        operation = rng.choice(self.operations)
        if operation == "-":
            a, b = max(a, b), min(a, b)
        answer = str(OPERATIONS[operation](a, b))
        return Example(
            question=f"What is {a} {operation} {b}?",
            answer=answer,
            verify=self.verifier.bind(answer),
            columns={"a": a, "b": b, "operation": operation},
        )


def is_held_out(question: str) -> bool:
    """Whether a problem belongs to evaluation: a tenth of all of them, fixed for good."""
    return zlib.crc32(question.encode()) % 10 == 0
