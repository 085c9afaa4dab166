"""Limits how many tokens are computed at once, and halves the limit when memory runs out."""

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
    """How many tokens are computed at once; halved whenever memory runs out."""

    tokens: int  # the target when batches are formed
    max_at_once: int  # the upper bound; only what can't be divided exceeds it
    name: str = "tokens in one forward and backward pass"  # for messages
    started_tokens: int = 0  # the size of the computation that was started last

    def record_start(self, tokens: int) -> None:
        """Records how many tokens are about to be computed together."""
        self.started_tokens = tokens

    def retry_smaller(self, work: Callable[[], T], undo: Callable[[], None] = lambda: None) -> T:
        """Returns work(); when memory runs out, halves the limit and calls it again.

        Args:
            undo: removes what an interrupted call of `work` has left; called before the next one.

        Raises:
            RunError: memory ran out with as few tokens as can be computed at once.
        """
        while True:
            try:
                return work()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            # Outside the handler, because its traceback holds the tensors of the work.
            undo()
            gc.collect()
            give_back_freed_memory()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.halve(reason)

    def call_once(self, work: Callable[[], T]) -> T:
        """Returns work(), for work that can't be repeated with less at once.

        Raises:
            RunError: memory ran out.
        """
        try:
            return work()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        raise RunError(
            f"out of memory with {self.started_tokens} {self.name} ({reason}); processes that "
            f"share the weights can't try again with fewer: resume with "
            f"device.token_budget={max(1, self.started_tokens // 2)}."
        )

    def halve(self, reason: str) -> None:
        """Limits to half of the tokens that were started last.

        Raises:
            RunError: these were one token, or a batch that can't be divided.
        """
        if self.started_tokens > self.max_at_once or self.started_tokens <= 1:
            raise RunError(
                f"out of memory with {self.started_tokens} {self.name}, which can't be divided "
                f"further ({reason}): lower max_new_tokens or dataset.max_prompt_tokens, or set "
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
    """The token limits of a run; shared by all that computes, and saved in checkpoints."""

    forward_limit: TokenLimit  # of a forward and backward pass
    cache_limit: TokenLimit  # of the positions in a rollout's cache
    # The config's values: GB, tokens, cache positions.
    configured: tuple[float | int | None, ...] = (None, None, None)

    @classmethod
    def from_tokens(cls, tokens: int, cache_positions: int | None = None) -> Budget:
        """Makes limits of so many tokens and cache positions, without regard to memory."""
        return cls(
            TokenLimit(tokens, tokens),
            TokenLimit(
                cache_positions or tokens,
                cache_positions or tokens,
                "positions in a rollout's cache",
            ),
        )

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint stores: the configured values and the limits."""
        limits = [
            self.forward_limit.tokens,
            self.forward_limit.max_at_once,
            self.cache_limit.tokens,
            self.cache_limit.max_at_once,
        ]
        return {"asked": self.configured, "limits": limits}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores the limits, unless the config has changed since.

        Sums over other micro-batches differ in the last bit; those of a resumed run must not.
        """
        if tuple(state["asked"]) == self.configured:
            self.forward_limit.tokens, self.forward_limit.max_at_once = state["limits"][:2]
            self.cache_limit.tokens, self.cache_limit.max_at_once = state["limits"][2:]


def split_evenly(sizes: Sequence[int], most: int) -> Iterator[slice]:
    """Yields runs of neighbours with similar sums of at most `most`; a larger item stays alone."""
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


# Messages of torch and of the libraries that it calls; only a GPU's have an exception class.
OUT_OF_MEMORY_MESSAGES = (
    "out of memory",
    "can't allocate memory",
    "alloc_failed",
    "could not create a primitive",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether the error says that memory ran out."""
    message = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in message for words in OUT_OF_MEMORY_MESSAGES
    )
