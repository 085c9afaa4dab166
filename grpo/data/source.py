"""The interface of a data set: the rows of each split, and the conversion of rows to examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpo.data.rows import MAX_EAGER_ROWS, Examples
from grpo.data.slices import parse_slice
from grpo.types import Example


class Source(ABC):
    """A data set: reads the rows of its splits and converts them to examples."""

    @property
    def commit(self) -> str | None:
        """The hub commit that the rows are from; None before any is read or without a hub."""
        return None

    @abstractmethod
    def rows(self, split: str) -> Sequence[Any]:
        """Returns all rows of a split, in a fixed order.

        Raises:
            ConfigError: there is no such split.
        """

    @abstractmethod
    def example(self, row: Any, number: int) -> Example:
        """Converts row `number` (from 0) to an example; called only for rows that a slice selects.

        If there are many rows, it is called again each time an example is accessed.
        """


@dataclass(frozen=True)
class Slices:
    """The rows for training and for evaluation, each a split and a slice, as in `train[:5%]`."""

    split: str
    slice: str
    eval_split: str
    eval_slice: str

    def read_training_examples(self, source: Source) -> Sequence[Example]:
        """Reads the training examples; if more than MAX_EAGER_ROWS, each is made when accessed."""
        rows = source.rows(self.split)
        numbers = parse_slice(self.slice, len(rows), "dataset.slice")
        if len(numbers) > MAX_EAGER_ROWS:
            return Examples(rows, numbers, source.example)
        return [source.example(rows[i], i) for i in numbers]

    def read_evaluation_examples(self, source: Source) -> list[Example]:
        rows = source.rows(self.eval_split)
        numbers = parse_slice(self.eval_slice, len(rows), "dataset.eval_slice")
        return [source.example(rows[i], i) for i in numbers]
