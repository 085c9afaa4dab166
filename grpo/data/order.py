"""An endless order over the training rows, where any place can be sought by its number."""

from __future__ import annotations

import math
import random
from array import array
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from grpo.seeds import derive_seed

DRAWS_PER_BLOCK = 1024  # draws of a mix decided on at once


@dataclass(frozen=True)
class Order:
    """Which row comes k-th. Nothing but k has to be remembered to go on.

    Each epoch of a set is a permutation of its own; a batch may end one and begin the next, so no
    size has to divide another. Several sets are mixed by drawing, for each k, which one is next.
    """

    sets: tuple[Sequence[int], ...]  # the rows of each, ascending
    probabilities: tuple[float, ...]  # of each set
    seed: int
    shuffled: bool = True

    def draw_batch(self, step: int, batch_size: int) -> list[int]:
        """The rows of a step's batch, step 1 first."""
        return self.draw_rows((step - 1) * batch_size, batch_size)

    def draw_replacements(
        self, step: int, attempt: int | str, stale: Sequence[int], shown: Collection[int] = ()
    ) -> list[int]:
        """Rows in the place of those of a step that taught nothing: others of the same set.

        Drawn at random whatever the order. None of `stale` and `shown`, which the step has had,
        comes again before all others of its set have; the time doesn't depend on their number.
        """
        rng = random.Random(f"{self.seed} {step} {attempt}")
        had = {*stale, *shown}
        found: list[int] = []
        for own in self.sets:
            wanted = sum(holds(own, row) for row in stale)
            found += draw_others(rng, own, wanted, {row for row in had if holds(own, row)})
        return found

    def draw_rows(self, first: int, count: int) -> list[int]:
        found = []
        for k in range(first, first + count):
            number, place = (0, k) if len(self.sets) == 1 else self._locate_in_mix(k)
            own = self.sets[number]
            epoch, at = divmod(place, len(own))
            seed = self.seed + 7_919 * number
            at = int(shuffle_epoch(epoch, len(own), seed)[at]) if self.shuffled else at
            found.append(own[at])
        return found

    def _locate_in_mix(self, k: int) -> tuple[int, int]:
        """The set of draw k, and how many draws before were of this set."""
        block, at = divmod(k, DRAWS_PER_BLOCK)
        drawn = draw_sets(block, self.probabilities, self.seed)
        before = count_earlier_draws(block, self.probabilities, self.seed)
        number = drawn[at]
        return number, before[number] + drawn[:at].count(number)


def holds(rows: Sequence[int], row: int) -> bool:
    """Whether a row is among ascending ones."""
    at = bisect_left(rows, row)
    return at < len(rows) and rows[at] == row


def draw_others(
    rng: random.Random, rows: Sequence[int], count: int, already_drawn: Collection[int]
) -> list[int]:
    """So many rows at random: different ones that are not among `had`, while there are any."""
    if len(rows) > 2 * (len(already_drawn) + count):  # at least every other draw is a new one
        fresh: dict[int, None] = {}
        while len(fresh) < count:
            row = rows[rng.randrange(len(rows))]
            if row not in already_drawn:
                fresh[row] = None
        return list(fresh)
    others = [row for row in rows if row not in already_drawn]
    found = rng.sample(others, min(count, len(others)))
    again = rng.sample(sorted(already_drawn), min(count - len(found), len(already_drawn)))
    return [*found, *again, *rng.choices(rows, k=count - len(found) - len(again))]


@lru_cache(maxsize=8)
def shuffle_epoch(epoch: int, rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
    return torch.randperm(rows, generator=generator)


@lru_cache(maxsize=4)
def draw_sets(block: int, probabilities: tuple[float, ...], seed: int) -> list[int]:
    """Which set each of a block of draws is from."""
    generator = torch.Generator().manual_seed(derive_seed(seed, 500_009 + block))
    weights = torch.tensor(probabilities)
    return torch.multinomial(
        weights, DRAWS_PER_BLOCK, replacement=True, generator=generator
    ).tolist()


@lru_cache(maxsize=4)
def count_earlier_draws(block: int, probabilities: tuple[float, ...], seed: int) -> list[int]:
    """How often each set was drawn in all blocks before this one."""
    total = [0] * len(probabilities)
    for earlier in range(block):
        drawn = draw_sets(earlier, probabilities, seed)
        total = [count + drawn.count(number) for number, count in enumerate(total)]
    return total


def order_one_set(rows: int, seed: int, shuffled: bool = True) -> Order:
    return Order((range(rows),), (1.0,), seed, shuffled)


def order_mix(sources: Sequence[str], probabilities: dict[str, float], seed: int) -> Order:
    """An order over rows of several sets, each row's set named."""
    sets = tuple(find_set_rows(sources, name) for name in probabilities)
    return Order(sets, tuple(probabilities.values()), seed)


def find_set_rows(sources: Sequence[str], name: str) -> Sequence[int]:
    """The rows of one set; a range where they stand together, as they mostly do."""
    count = sources.count(name)
    first = sources.index(name) if count else 0
    together = range(first, first + count)
    if all(sources[row] == name for row in together):
        return together
    return array("q", (row for row, own in enumerate(sources) if own == name))


def count_steps(rows: int, batch_size: int, num_epochs: int, max_steps: int | None) -> int:
    """Steps until as many rows were seen as `num_epochs` hold, or `max_steps` if given."""
    if max_steps is not None:
        return max_steps
    return math.ceil(num_epochs * rows / batch_size)
