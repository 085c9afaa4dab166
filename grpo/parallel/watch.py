"""Notices that a rank is lost: its process ended, its machine is gone, or it no longer answers."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch._C._distributed_c10d import Store

BEAT_SECONDS = 2.0  # between two signs of life
LOST_SECONDS = 30.0  # without a sign of life
BROKEN_SECONDS = 8.0  # without one, once a connection has broken
FAILURE = "failure"  # the store's key for what a rank has reported
GRACE_SECONDS = 10.0  # in which a rank may end by itself after another one is lost


class Watch:
    """Shows that this rank lives, and ends the process if another one does not.

    A lost rank mostly breaks a connection that the others wait for, and they end with its error.
    Where nothing breaks, as with a machine that lost its network, the watch ends the process.
    """

    def __init__(
        self,
        store: Store,
        index: int,
        size: int,
        find_dead: Callable[[], str] = lambda: "",
        end_others: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            store: of the ranks; the watch opens a connection of its own.
            find_dead: says which process, started by this one, has ended; "" if none has.
            end_others: ends the processes started by this one, whose connections then break.
        """
        self.store: Store = store.clone()  # type: ignore[attr-defined]
        self.index, self.size = index, size
        self.store.set_timeout(timedelta(seconds=LOST_SECONDS))
        self.find_dead, self.end_others = find_dead, end_others
        self.lost = ""  # which rank, and why
        self.patience = LOST_SECONDS
        self.last_answer = time.monotonic()  # of the store
        self.seen: dict[int, tuple[bytes, float]] = {}  # last sign of life, when it came
        self.ended = threading.Event()
        # Two threads, since a store on a machine that is gone never answers.
        for target in (self._exchange_signs, self._guard):
            threading.Thread(target=target, daemon=True, name="watch of the ranks").start()

    def stop(self) -> None:
        """Ends the watch, at the end of the run."""
        self.ended.set()

    def report_failure(self, message: str) -> None:
        """Tells the other ranks why this one ends, where they don't wait for a message."""
        self.store.set(FAILURE, message)

    def read_failure(self) -> str:
        """Returns what a rank has reported; "" if none has."""
        return self.store.get(FAILURE).decode() if self.store.check([FAILURE]) else ""

    def explain_loss(self, error: BaseException) -> str:
        """Returns which rank was lost, when a connection has broken with an error."""
        self.patience = BROKEN_SECONDS
        deadline = time.monotonic() + 2 * BROKEN_SECONDS
        while not self.lost and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.lost or f"the connection to another rank broke: {first_line(error)}"

    def _guard(self) -> None:
        """Ends the process some time after a rank was lost."""
        lost_at = 0.0
        while not self.ended.wait(0.5):
            silence = time.monotonic() - self.last_answer
            if not self.lost and silence > self.patience:
                self.lost = f"rank 0 gave no answer for {self.patience:g} s"
            if not self.lost:
                self.lost = (dead := self.find_dead()) and (self.read_failure() or dead)
            if self.lost and not lost_at:
                lost_at = time.monotonic()
                self.end_others()
            if self.lost and time.monotonic() - lost_at > GRACE_SECONDS:
                print(f"grpo: {self.lost}; rank {self.index} ends too.", file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)

    def _exchange_signs(self) -> None:
        """Gives a sign of life again and again, and looks for those of the others."""
        beats = 0
        while not self.ended.wait(BEAT_SECONDS) and not self.lost:
            beats += 1
            try:
                self.store.set(f"alive/{self.index}", f"{beats} {socket.gethostname()}")
                self._read_signs()
            except RuntimeError as error:
                self.lost = self.lost or f"rank 0 can't be reached ({first_line(error)})"
            self.last_answer = time.monotonic()

    def _read_signs(self) -> None:
        self.lost = self.lost or self.read_failure()
        others = [n for n in range(self.size) if n != self.index]
        known = [n for n in others if self.store.check([f"alive/{n}"])]
        signs = self.store.multi_get([f"alive/{n}" for n in known]) if known else []
        now = time.monotonic()
        for n, sign in zip(known, signs, strict=True):
            before = self.seen.get(n)
            if before is None or before[0] != sign:
                self.seen[n] = (sign, now)
            elif now - before[1] > self.patience:
                host = sign.decode().partition(" ")[2]
                seconds = f"{self.patience:g} s"
                self.lost = self.lost or f"rank {n} on {host} gave no sign of life for {seconds}"


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
