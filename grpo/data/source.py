"""What a data set is to the rest: splits of rows, and a way to make an example of a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpo.data.slices import parse_slice
from grpo.types import Example


class Source(ABC):
    """Where examples come from."""

    @abstractmethod
    def rows(self, split: str) -> Sequence[Any]:
        """All rows of a split, in a fixed order.

        Raises:
            ConfigError: there is no such split.
        """

    @abstractmethod
    def example(self, row: Any, number: int) -> Example:
        """Row `number` (from 0) as an example; made only of rows that a slice selects."""


@dataclass(frozen=True)
class Slices:
    """Which rows are trained on and which are evaluated on: `train[:5%]` is split and slice."""

    split: str
    slice: str
    eval_split: str
    eval_slice: str

    def train(self, source: Source) -> list[Example]:
        return select(source, self.split, self.slice, "dataset.slice")

    def evaluation(self, source: Source) -> list[Example]:
        return select(source, self.eval_split, self.eval_slice, "dataset.eval_slice")


def select(source: Source, split: str, slice: str, key: str) -> list[Example]:
    rows = source.rows(split)
    return [source.example(rows[i], i) for i in parse_slice(slice, len(rows), key)]
