"""How much is computed at once, and how it goes on with less once memory has run out."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from grpo.errors import RunError
from grpo.memory.allocator import give_back_freed_memory

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class TokenLimit:
    """So many tokens at once; half of what was too much, once memory has run out."""

    tokens: int  # where there is a choice
    max_at_once: int  # that there may be: only what can't be divided has more
    name: str = "tokens in one forward and backward pass"
    started_tokens: int = 0

    def record_start(self, tokens: int) -> None:
        """To be told before so many are computed together."""
        self.started_tokens = tokens

    def retry_smaller(self, work: Callable[[], T], undo: Callable[[], None] = lambda: None) -> T:
        """What `work` gives; it begins anew, with half as much at once, where memory runs out.

        undo: takes back what a work that was broken off has left.

        Raises:
            RunError: it was as little as can be computed at once.
        """
        while True:
            try:
                return work()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            # Out of the handler, whose traceback holds the tensors of the work.
            undo()
            gc.collect()
            give_back_freed_memory()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.halve(reason)

    def halve(self, reason: str) -> None:
        if self.started_tokens > self.max_at_once or self.started_tokens <= 1:
            raise RunError(
                f"out of memory with {self.started_tokens} {self.name}, and fewer can't be "
                f"({reason}): lower max_new_tokens or dataset.max_prompt_tokens, or set "
                f"device.gradient_checkpointing=true, adapter=lora, or another device."
            )
        self.max_at_once = self.started_tokens // 2
        self.tokens = min(self.tokens, self.max_at_once)
        log.warning(
            "out of memory with %d %s: from here on at most %d.",
            self.started_tokens, self.name, self.max_at_once,
        )  # fmt: skip


@dataclass
class Budget:
    """What is held at once; shared by all that compute, kept in checkpoints."""

    forward_limit: TokenLimit
    cache_limit: TokenLimit
    configured: tuple[float | int | None, ...] = (
        None,
        None,
        None,
    )  # GB, tokens, positions: the config's

    @classmethod
    def from_tokens(cls, tokens: int, cache_positions: int | None = None) -> Budget:
        """So many, whatever they take."""
        return cls(
            TokenLimit(tokens, tokens),
            TokenLimit(
                cache_positions or tokens,
                cache_positions or tokens,
                "positions in a rollout's cache",
            ),
        )

    def state(self) -> dict[str, Any]:
        limits = [
            self.forward_limit.tokens,
            self.forward_limit.max_at_once,
            self.cache_limit.tokens,
            self.cache_limit.max_at_once,
        ]
        return {"asked": self.configured, "limits": limits}

    def load_state(self, state: dict[str, Any]) -> None:
        """Divides as before, unless something else is asked for now.

        Sums over other micro-batches differ in the last bit, and a resumed run should not.
        """
        if tuple(state["asked"]) == self.configured:
            self.forward_limit.tokens, self.forward_limit.max_at_once = state["limits"][:2]
            self.cache_limit.tokens, self.cache_limit.max_at_once = state["limits"][2:]


def split_evenly(sizes: Sequence[int], most: int) -> Iterator[slice]:
    """Neighbours that have up to `most` together, at least one, and all about the same."""
    if not sizes:
        return
    target = sum(sizes) / -(-sum(sizes) // most)
    start = total = 0
    for n, size in enumerate(sizes):
        if n > start and (total + size > most or total + size / 2 > target):
            yield slice(start, n)
            start, total = n, 0
        total += size
    yield slice(start, len(sizes))


# What torch and the libraries under it say; only for a GPU is there a class for that.
OUT_OF_MEMORY_MESSAGES = (
    "out of memory",
    "can't allocate memory",
    "alloc_failed",
    "could not create a primitive",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that there was no memory left."""
    said = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in said for words in OUT_OF_MEMORY_MESSAGES
    )
