"""An endless order of the training rows; the row at any position is computed from its number."""

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

DRAWS_PER_BLOCK = 1024  # draws of a mix that are sampled together


@dataclass(frozen=True)
class Order:
    """Tells which row comes k-th; a resumed run needs only k.

    Each epoch of a set is a new permutation; a batch may span two epochs, so no size has to divide
    another. Several sets are mixed by drawing, for each k, the set of the next row.
    """

    sets: tuple[Sequence[int], ...]  # the rows of each, ascending
    probabilities: tuple[float, ...]  # of each set
    seed: int
    shuffled: bool = True

    def draw_batch(self, step: int, batch_size: int) -> list[int]:
        """Returns the rows of a step's batch; the first step is 1."""
        return self.draw_rows((step - 1) * batch_size, batch_size)

    def draw_replacements(
        self, step: int, attempt: int | str, replaced: Sequence[int], shown: Collection[int] = ()
    ) -> list[int]:
        """Draws a row of the same set for each row in `replaced`, at random whatever the order.

        No row of `replaced` and `shown`, which the step has had, comes again before all others of
        its set have come. The time doesn't grow with the number of the others.
        """
        rng = random.Random(f"{self.seed} {step} {attempt}")
        had = {*replaced, *shown}
        found: list[int] = []
        for rows in self.sets:
            wanted = sum(holds(rows, row) for row in replaced)
            found += draw_others(rng, rows, wanted, {row for row in had if holds(rows, row)})
        return found

    def draw_rows(self, first: int, count: int) -> list[int]:
        found = []
        for k in range(first, first + count):
            number, place = (0, k) if len(self.sets) == 1 else self._locate_in_mix(k)
            rows = self.sets[number]
            epoch, at = divmod(place, len(rows))
            seed = self.seed + 7_919 * number
            at = int(shuffle_epoch(epoch, len(rows), seed)[at]) if self.shuffled else at
            found.append(rows[at])
        return found

    def _locate_in_mix(self, k: int) -> tuple[int, int]:
        """Returns the set of draw k, and how many earlier draws were from this set."""
        block, at = divmod(k, DRAWS_PER_BLOCK)
        drawn = draw_sets(block, self.probabilities, self.seed)
        before = count_earlier_draws(block, self.probabilities, self.seed)
        number = drawn[at]
        return number, before[number] + drawn[:at].count(number)


def holds(rows: Sequence[int], row: int) -> bool:
    """Returns whether a row is in an ascending sequence."""
    at = bisect_left(rows, row)
    return at < len(rows) and rows[at] == row


def draw_others(
    rng: random.Random, rows: Sequence[int], count: int, already_drawn: Collection[int]
) -> list[int]:
    """Draws `count` rows at random: new and different ones first, others once those run out."""
    if len(rows) > 2 * (len(already_drawn) + count):  # at least half of the draws are new
        fresh: dict[int, None] = {}
        while len(fresh) < count:
            row = rows[rng.randrange(len(rows))]
            if row not in already_drawn:
                fresh[row] = None
        return list(fresh)
    others = [row for row in rows if row not in already_drawn]
    found = rng.sample(others, min(count, len(others)))
    repeated = rng.sample(sorted(already_drawn), min(count - len(found), len(already_drawn)))
    return [*found, *repeated, *rng.choices(rows, k=count - len(found) - len(repeated))]


@lru_cache(maxsize=8)
def shuffle_epoch(epoch: int, rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
    return torch.randperm(rows, generator=generator)


@lru_cache(maxsize=4)
def draw_sets(block: int, probabilities: tuple[float, ...], seed: int) -> list[int]:
    """Draws, for each position in a block, the set that its row is from."""
    generator = torch.Generator().manual_seed(derive_seed(seed, 500_009 + block))
    weights = torch.tensor(probabilities)
    return torch.multinomial(
        weights, DRAWS_PER_BLOCK, replacement=True, generator=generator
    ).tolist()


@lru_cache(maxsize=4)
def count_earlier_draws(block: int, probabilities: tuple[float, ...], seed: int) -> list[int]:
    """Counts how often each set was drawn in all earlier blocks."""
    total = [0] * len(probabilities)
    for earlier in range(block):
        drawn = draw_sets(earlier, probabilities, seed)
        total = [count + drawn.count(number) for number, count in enumerate(total)]
    return total


def order_one_set(rows: int, seed: int, shuffled: bool = True) -> Order:
    return Order((range(rows),), (1.0,), seed, shuffled)


def order_mix(sources: Sequence[str], probabilities: dict[str, float], seed: int) -> Order:
    """Builds an order over rows of several sets; `sources` names each row's set."""
    sets = tuple(find_set_rows(sources, name) for name in probabilities)
    return Order(sets, tuple(probabilities.values()), seed)


def find_set_rows(sources: Sequence[str], name: str) -> Sequence[int]:
    """Returns the rows of one set; as a range if they are consecutive, as they mostly are."""
    count = sources.count(name)
    first = sources.index(name) if count else 0
    together = range(first, first + count)
    if all(sources[row] == name for row in together):
        return together
    return array("q", (row for row, source in enumerate(sources) if source == name))


def count_steps(rows: int, batch_size: int, num_epochs: int, max_steps: int | None) -> int:
    """Returns the steps that `num_epochs` times `rows` rows take, or `max_steps` if given."""
    if max_steps is not None:
        return max_steps
    return math.ceil(num_epochs * rows / batch_size)
