"""The ranks of a run with several processes, connected by torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from grpo.errors import ConfigError, RunError
from grpo.parallel.messages import pack, unpack
from grpo.parallel.ranks import Ranks
from grpo.parallel.watch import Watch

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)
# A rank may wait for hours for another's rewards. One that is lost is noticed by `Watch`.
LONGEST_WAIT = timedelta(days=7)
BUCKET_ELEMENTS = 2**23  # of small gradients, which are summed as one tensor


@dataclass(frozen=True)
class Place:
    """Which of the run's processes this one is."""

    index: int
    size: int
    local_index: int  # among those on this machine
    local_size: int

    @classmethod
    def read_environment(cls) -> Place:
        """Reads the variables that torchrun sets; without them the run has one process."""
        names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        return cls(*(int(os.environ.get(name, default)) for name, default in names.items()))


class ProcessGroup(Ranks):
    """Ranks that exchange messages over gloo, and gradients over NCCL where they are on GPUs.

    Every exchange carries, for each rank, its result or its error, and every sum of gradients
    follows such an exchange. So an error on one rank ends all of them at the next exchange.
    """

    def __init__(self, place: Place, store: Store, watch: Watch) -> None:
        """Connects to the other ranks; returns when all are connected.

        Raises:
            RunError: they could not be connected.
        """
        self.index, self.size = place.index, place.size
        self.local_index, self.local_size = place.local_index, place.local_size
        self.watch = watch
        self.is_working = False  # within the work of this rank alone, not what all ranks do
        self.announced: BaseException | None = None  # the error that all ranks know of
        self.device = torch.device("cpu")
        backend = "gloo"
        if torch.cuda.is_available():
            backend, self.device = "cpu:gloo,cuda:nccl", torch.device("cuda", place.local_index)
        with self.reporting_loss():
            dist.init_process_group(
                backend, store=store, rank=self.index, world_size=self.size, timeout=LONGEST_WAIT
            )

    def gather(self, work: Callable[[], T]) -> list[T]:
        own: list[T] = []
        failure: Exception | None = None
        self.is_working = True
        try:
            own.append(work())
        except Exception as error:  # noqa: BLE001 - raised below, when all ranks know of it
            failure = error
        finally:
            self.is_working = False
        if failure is not None and failure is self.announced:
            raise failure
        answers = self._exchange(own, failure)
        errors = [answer for answer in answers if isinstance(answer, RemoteError)]
        if failure is not None or errors:
            raise self._end_with(failure or errors[0].to_exception())
        return [own[0] if n == self.index else answer for n, answer in enumerate(answers)]

    def compute_on_first(self, work: Callable[[], T]) -> T:
        results: list[T | None] = self.gather(lambda: work() if self.is_first else None)
        return results[0]  # type: ignore[return-value]

    def compute_together(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except BaseException as error:
            if isinstance(error, RuntimeError) and is_connection_error(error):
                raise self._find_loss(error) from error
            if error is not self.announced:
                # The others wait for this rank's part of a sum, not for a message.
                self.watch.report_failure(RemoteError.describe(error, self.index).message)
                self.is_broken = True
                self._end_with(error)
            raise

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        trained = list(parameters)
        if not any(self.gather(lambda: any(p.grad is not None for p in trained))):
            return
        gradients = [get_gradient(p) for p in trained]
        with self.reporting_loss():
            for bucket in collect_buckets(gradients):
                if len(bucket) == 1:
                    dist.all_reduce(bucket[0])
                    continue
                joined = torch.cat([gradient.flatten() for gradient in bucket])
                dist.all_reduce(joined)
                sums = joined.split([gradient.numel() for gradient in bucket])
                for gradient, total in zip(bucket, sums, strict=True):
                    gradient.copy_(total.view_as(gradient))

    def announce(self, error: BaseException) -> None:
        """Tells the other ranks, which are waiting, that this one ends with an error."""
        if self.announced is not None or not dist.is_initialized():
            return
        try:
            self._exchange([], error)
        except RunError:  # they are no longer there
            return
        self._end_with(error)

    def leave(self) -> None:
        """Ends the connection, when all ranks have nothing more to send."""
        self.watch.stop()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _exchange(self, own: list[T], failure: BaseException | None) -> list[T]:
        """Sends this rank's result, or error, to all; returns what all have sent."""
        sent = own[0] if failure is None else RemoteError.describe(failure, self.index)
        message = torch.frombuffer(bytearray(pack(sent)), dtype=torch.uint8)
        with self.reporting_loss():
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(lengths, torch.tensor([len(message)]))
            longest = int(max(lengths))
            padded = torch.nn.functional.pad(message, (0, longest - len(message)))
            received = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(received, padded)
        return [
            unpack(answer[: int(length)].numpy().tobytes(), self.device)
            for answer, length in zip(received, lengths, strict=True)
        ]

    @contextmanager
    def reporting_loss(self) -> Iterator[None]:
        """Within it, a broken connection raises RunError and names the rank that was lost."""
        try:
            yield
        except RuntimeError as error:
            raise self._find_loss(error) from error

    def _find_loss(self, error: RuntimeError) -> RunError:
        """Returns an error that names the rank that was lost, when a connection has broken."""
        self.is_broken = True
        return self._end_with(RunError(self.watch.explain_loss(error)))

    def _end_with(self, error: E) -> E:
        """Remembers the error that ends all ranks, and returns it.

        From here on this rank waits for no other, so it may take any time to write a checkpoint.
        """
        self.announced = error
        self.watch.stop()
        return error


def is_connection_error(error: RuntimeError) -> bool:
    """Returns whether gloo, NCCL or the store says that a connection has broken."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


@dataclass(frozen=True)
class RemoteError:
    """An error of another rank."""

    kind: str
    message: str

    @classmethod
    def describe(cls, error: BaseException, rank: int) -> RemoteError:
        kind = type(error).__name__
        known = isinstance(error, ConfigError | RunError)
        if isinstance(error, KeyboardInterrupt):
            return cls(kind, f"rank {rank} was interrupted")
        return cls(kind, f"rank {rank}: {error}" if known else f"rank {rank}: {kind}: {error}")

    def to_exception(self) -> Exception:
        return ConfigError(self.message) if self.kind == "ConfigError" else RunError(self.message)


def get_gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def collect_buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yields gradients in order: large ones alone, small ones together, those of a type only."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if gradient.numel() >= BUCKET_ELEMENTS and gradient.is_contiguous():
            yield [gradient]
            continue
        elements = sum(other.numel() for other in bucket) + gradient.numel()
        if bucket and (elements > BUCKET_ELEMENTS or bucket[0].dtype != gradient.dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket
