"""Tasks of reasoning-gym: generated without end, each scored by its own verifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo.config import nearest
from grpo.data.arithmetic import at_least_one, size_key
from grpo.data.rows import Generated
from grpo.data.source import Source
from grpo.data.verify import extractor, likely_answer
from grpo.errors import ConfigError
from grpo.types import Example

# What the tasks' scorers raise over an answer that has not the form they expect: it is wrong.
UNREADABLE = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, SyntaxError)


class ReasoningGym(Source):
    """One task with its options; training and evaluation are drawn with seeds of their own.

    The verifiers give partial credit for text around an answer, and some for none at all. So the
    answer is extracted first, and `strict` counts only a full score.
    """

    def __init__(
        self,
        task: str | None,
        size: int,
        eval_size: int,
        options: Mapping[str, Any],
        extract: str = "tag",
        strict: bool = True,
        seed: int = 0,
    ) -> None:
        from reasoning_gym.factory import DATASETS

        if task is None:
            raise ConfigError("dataset.task is not set, for example dataset.task=basic_arithmetic.")
        if task not in DATASETS:
            raise ConfigError(f"dataset.task={task}: no such task{nearest(task, DATASETS)}")
        self.task, self.options, self.seed = task, dict(options), seed
        self.size, self.eval_size = at_least_one(size, "size"), at_least_one(eval_size, "eval_size")
        self.extract, self.strict = extractor(extract), strict

    def rows(self, split: str) -> Sequence[Example]:
        size: int = getattr(self, size_key(split))
        seed = 2 * self.seed + (split == "test")
        import reasoning_gym

        try:
            problems = reasoning_gym.create_dataset(self.task, size=size, seed=seed, **self.options)
        except (TypeError, AssertionError, ValueError) as error:
            raise ConfigError(f"dataset.options of {self.task}: {error}") from error

        def make(number: int) -> Example:
            entry = problems[number]
            return Example(
                question=entry["question"],
                answer=str(entry["answer"]),
                verify=self._verifier(problems, entry, self.extract),
                columns=entry["metadata"],
                read=self.extract,
                lenient=self._verifier(problems, entry, likely_answer),
            )

        return Generated(size, make)

    def example(self, row: Example, number: int) -> Example:
        return row

    def _verifier(
        self, problems: Any, entry: dict[str, Any], read: Callable[[str], str | None]
    ) -> Callable[[str], float]:
        def verify(completion: str) -> float:
            answer = read(completion)
            if answer is None:
                return 0.0
            try:
                credit = float(problems.score_answer(answer, entry))
            except UNREADABLE:
                return 0.0
            return float(credit >= 1.0) if self.strict else credit

        return verify
