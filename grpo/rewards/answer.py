"""Rewards for one right answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from grpo.data.answers import extract_tagged_answer, verify_answer
from grpo.types import Failure, Sample

ANSWER_TAGS = re.compile(r"</?answer>")

NO_GOLD = Failure("its row has no single gold answer; use reward=task, the data set's own verifier")


class Answer:
    """1 if the text in `<answer>…</answer>` equals the gold answer, else 0.

    A row without a gold answer, as in a task with several right answers, gives a failure.
    """

    def __call__(self, samples: Sequence[Sample]) -> list[float | Failure]:
        return [
            verify_answer(sample.answer, extract_tagged_answer, sample.completion)
            if sample.answer
            else NO_GOLD
            for sample in samples
        ]


class AnswerFormat:
    """1 if a completion has exactly one `<answer>…</answer>`, else 0."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [
            float(ANSWER_TAGS.findall(sample.completion) == ["<answer>", "</answer>"])
            for sample in samples
        ]


class Task:
    """The score of the data set's own verifier, which finds the answer by `dataset.extract`."""

    def __call__(self, samples: Sequence[Sample]) -> list[float | Failure]:
        return [sample.verdict for sample in samples]
