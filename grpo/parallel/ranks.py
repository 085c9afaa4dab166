"""The interface to the other processes of a run, and the run that has only one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class Ranks:
    """The processes of a run. This class is a run with one process; subclasses have more.

    All ranks hold the same rollout, scores and advantages, and take the same decisions. Only what
    is expensive is divided: each rank computes a share of the prompts, and `gather` gives all
    results to all ranks. A mean or a quantile therefore needs no second, distributed form.
    """

    is_broken = False  # another rank is lost, or waits for what this one won't compute
    index = 0  # this process's number
    size = 1
    local_index = 0  # among those on this machine
    local_size = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's files and speaks to the terminal."""
        return self.index == 0

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Calls `work` on every rank, and returns their results in the order of the ranks.

        Raises:
            RunError: it raised on another rank. Where it raised itself, that error is raised.
        """
        return [work()]

    def compute_on_first(self, work: Callable[[], T]) -> T:
        """Calls `work` on the first rank alone, and returns its result on every rank."""
        return work()

    def compute_together(self, work: Callable[[], T]) -> T:
        """Returns work(), within which the ranks wait for each other; an error ends all of them.

        Raises:
            RunError: another rank failed. Where `work` raised itself, that error is raised.
        """
        return work()

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replaces each gradient by its sum over the ranks; a rank without any counts as zeros."""

    def divide(self, costs: Sequence[float]) -> list[list[int]]:
        """Divides items among the ranks; returns the indices of each rank's, in order."""
        return divide_by_cost(costs, self.size)


ONE_RANK = Ranks()


def divide_by_cost(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Divides items into parts of similar total cost; returns the indices in each, in order.

    The dearest item first, each to the part that costs least so far: Graham's longest processing
    time rule, at most 4/3 of the best division. Items of equal cost are dealt out in turn.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    totals = [0.0] * parts
    for n in sorted(range(len(costs)), key=lambda n: -costs[n]):
        part = min(range(parts), key=lambda part: (totals[part], len(shares[part])))
        shares[part].append(n)
        totals[part] += costs[n]
    return [sorted(share) for share in shares]
