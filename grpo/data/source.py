"""What a data set is to the rest: rows to train on and rows to evaluate on."""

from __future__ import annotations

from abc import ABC, abstractmethod

from grpo.types import Example


class Source(ABC):
    """Where examples come from."""

    @abstractmethod
    def train(self) -> list[Example]:
        """The rows to train on, in a fixed order."""

    @abstractmethod
    def evaluation(self) -> list[Example]:
        """The held-out rows, in a fixed order."""
