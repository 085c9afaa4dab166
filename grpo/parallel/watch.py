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
GRACE_SECONDS = 10.0  # in which a rank may end by itself after another one is lost


class Watch:
    """A thread that shows that this rank lives, and ends the process if another one does not.

    A lost rank mostly breaks a connection that the others wait for, and they end with its error.
    Where nothing breaks, as with a machine that lost its network, this thread ends the process.
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
        self.seen: dict[int, tuple[bytes, float]] = {}  # last sign of life, when it came
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True, name="watch of the ranks")
        self.thread.start()

    def stop(self) -> None:
        """Ends the watch, at the end of the run."""
        self.ended.set()
        self.thread.join(timeout=1.0)  # it may wait for a store that is gone

    def explain_loss(self, error: BaseException) -> str:
        """Returns which rank was lost, when a connection has broken with an error."""
        self.patience = BROKEN_SECONDS
        deadline = time.monotonic() + 2 * BROKEN_SECONDS
        while not self.lost and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.lost or f"the connection to another rank broke: {first_line(error)}"

    def _run(self) -> None:
        beats, lost_at = 0, 0.0
        while not self.ended.wait(BEAT_SECONDS if not self.lost else 0.5):
            beats += 1
            self.lost = self.lost or self._look(beats)
            if self.lost:
                if not lost_at:
                    lost_at = time.monotonic()
                    self.end_others()
                if time.monotonic() - lost_at > GRACE_SECONDS:
                    print(f"grpo: {self.lost}; rank {self.index} ends too.", file=sys.stderr)
                    sys.stderr.flush()
                    os._exit(1)

    def _look(self, beats: int) -> str:
        """Gives a sign of life, and returns which rank is lost; "" if none is."""
        if dead := self.find_dead():
            return dead
        try:
            self.store.set(f"alive/{self.index}", f"{beats} {socket.gethostname()}")
            others = [n for n in range(self.size) if n != self.index]
            keys = [f"alive/{n}" for n in others]
            known = [n for n, key in zip(others, keys, strict=True) if self.store.check([key])]
            signs = self.store.multi_get([f"alive/{n}" for n in known]) if known else []
        except RuntimeError as error:
            return f"rank 0 can't be reached ({first_line(error)})"
        now = time.monotonic()
        for n, sign in zip(known, signs, strict=True):
            before = self.seen.get(n)
            if before is None or before[0] != sign:
                self.seen[n] = (sign, now)
            elif now - before[1] > self.patience:
                host = sign.decode().partition(" ")[2]
                return f"rank {n} on {host} gave no sign of life for {self.patience:g} s"
        return ""


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
