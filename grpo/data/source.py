"""What a data set is to the rest: splits of rows, and a way to make an example of a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpo.data.rows import MAX_EAGER_ROWS, Examples
from grpo.data.slices import parse_slice
from grpo.types import Example


class Source(ABC):
    """Where examples come from."""

    @property
    def commit(self) -> str | None:
        """Of the hub, that the rows are from, once some were read; None where they are not."""
        return None

    @abstractmethod
    def rows(self, split: str) -> Sequence[Any]:
        """All rows of a split, in a fixed order.

        Raises:
            ConfigError: there is no such split.
        """

    @abstractmethod
    def example(self, row: Any, number: int) -> Example:
        """Row `number` (from 0) as an example; made only of rows that a slice selects.

        Where there are many rows an example is made anew each time that it is asked for.
        """


@dataclass(frozen=True)
class Slices:
    """Which rows are trained on and which are evaluated on: `train[:5%]` is split and slice."""

    split: str
    slice: str
    eval_split: str
    eval_slice: str

    def read_training_examples(self, source: Source) -> Sequence[Example]:
        """The examples to train on; of more than EAGER, each is made when it is asked for."""
        rows = source.rows(self.split)
        numbers = parse_slice(self.slice, len(rows), "dataset.slice")
        if len(numbers) > MAX_EAGER_ROWS:
            return Examples(rows, numbers, source.example)
        return [source.example(rows[i], i) for i in numbers]

    def read_evaluation_examples(self, source: Source) -> list[Example]:
        rows = source.rows(self.eval_split)
        numbers = parse_slice(self.eval_slice, len(rows), "dataset.eval_slice")
        return [source.example(rows[i], i) for i in numbers]
