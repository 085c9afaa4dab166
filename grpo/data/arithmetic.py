"""Generated sums: a data set that needs no download and whose answers are correct for certain."""

from __future__ import annotations

import math
import random
import zlib
from array import array
from collections.abc import Sequence

from grpo.data.answers import answered, choose_extractor
from grpo.data.rows import GeneratedRows
from grpo.data.source import Source
from grpo.errors import ConfigError
from grpo.types import Example

OPERATORS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b}


class Arithmetic(Source):
    """Problems like `What is 47 + 38?`, drawn without repetition.

    One problem in ten, chosen by a hash of its text, is for evaluation and never for training,
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
            raise ConfigError(
                f"dataset.digits={digits}: use 1 to 9 digits.", key="dataset.digits", value=digits
            )
        unknown = sorted(set(operations) - set(OPERATORS))
        if unknown or not operations:
            raise ConfigError(
                f"dataset.operations={operations!r}: use +, - or +-.",
                key="dataset.operations",
                value=operations,
            )
        self.digits, self.operations, self.seed = digits, sorted(set(operations)), seed
        choose_extractor(extract)
        self.extract = extract
        self.size, self.eval_size = check_count(size, "size"), check_count(eval_size, "eval_size")

    def rows(self, split: str) -> Sequence[Example]:
        key = get_size_key(split)
        size: int = getattr(self, key)
        held_out = split == "test"
        about, most = self._count_problems(held_out)
        none_left = ConfigError(
            f"dataset.{key}={size}: there are only about {about} different problems of "
            f"{self.digits} digits; lower it, or raise dataset.digits.",
            key=f"dataset.{key}",
            value=size,
        )
        if size > most:
            raise none_left
        rng = random.Random(f"{self.seed} {held_out}")
        drawn: dict[int, None] = {}  # in order, without repetition
        for _ in range(100 * size):
            number = self._draw_number(rng)
            if number not in drawn and is_held_out(self._format_question(number)) == held_out:
                drawn[number] = None
            if len(drawn) == size:
                return self._make_problems(array("q", drawn))
        raise none_left

    def _make_problems(self, numbers: array[int]) -> GeneratedRows:
        return GeneratedRows(len(numbers), lambda n: self._make_problem(numbers[n]))

    def example(self, row: Example, number: int) -> Example:
        return row

    def _count_problems(self, held_out: bool) -> tuple[int, int]:
        """Returns about how many different problems there are, and an upper bound.

        The hash acts like chance, so the bound adds five standard deviations.
        """
        numbers = 10**self.digits
        sums = {"+": numbers**2, "-": numbers * (numbers + 1) // 2}
        total = sum(sums[operation] for operation in self.operations)
        about = total * (0.1 if held_out else 0.9)
        return round(about), math.ceil(about + 5 * math.sqrt(total * 0.1 * 0.9))

    def _draw_number(self, rng: random.Random) -> int:
        """Draws a problem, encoded as one number: a, b and the operation are its digits."""
        numbers = 10**self.digits
        a, b = rng.randrange(numbers), rng.randrange(numbers)
        operation = rng.choice(self.operations)
        if operation == "-":
            a, b = max(a, b), min(a, b)
        which = self.operations.index(operation)
        return int((a * numbers + b) * len(self.operations) + which)

    def _decode_number(self, number: int) -> tuple[int, int, str]:
        both, operation = divmod(number, len(self.operations))
        return (*divmod(both, 10**self.digits), self.operations[operation])

    def _format_question(self, number: int) -> str:
        a, b, operation = self._decode_number(number)
        return f"What is {a} {operation} {b}?"

    def _make_problem(self, number: int) -> Example:
        a, b, operation = self._decode_number(number)
        answer = str(OPERATORS[operation](a, b))
        columns = {"a": a, "b": b, "operation": operation}
        return answered(self._format_question(number), answer, self.extract, columns)


def check_count(count: int, key: str) -> int:
    if count < 1:
        raise ConfigError(
            f"dataset.{key}={count}: needs at least 1 problem.", key=f"dataset.{key}", value=count
        )
    return count


def get_size_key(split: str) -> str:
    """Returns the key that sets how many rows of a split are generated."""
    keys = {"train": "size", "test": "eval_size"}
    if split not in keys:
        raise ConfigError(
            f"dataset.split={split}: a generated data set has train and test.",
            key="dataset.split",
            value=split,
        )
    return keys[split]


def is_held_out(question: str) -> bool:
    """Returns whether a problem is for evaluation, as a fixed tenth of all problems is."""
    return zlib.crc32(question.encode()) % 10 == 0
