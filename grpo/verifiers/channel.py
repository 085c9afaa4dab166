"""Carries questions and answers between a program and its grader, over two pipes.

One side asks and the other answers. Before it answers it may ask back, and so on. A side exits at
once if the other is gone, or if it reads anything but a message; no later test passes.
"""

from __future__ import annotations

import os
from _thread import RLock, get_ident

TYPE_CHECKING = False  # see confine.py
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

MAX_MESSAGE_BYTES = 32 << 20  # size limit of one message
MAX_NESTED_QUESTIONS = 50  # questions open at the same time, each asked to answer another


class Channel:
    """One end of the two pipes.

    Args:
        incoming: descriptor of the pipe to read.
        outgoing: descriptor of the pipe to write.
        pack: turns the kind and the content of a message into bytes, or raises and changes nothing.
        unpack: turns the bytes into kind and content; if it raises, this process exits.
        serve: executes a question of the other side: an operation, its operands and options.
        asks_first: whether this side may ask when it is not answering a question.
    """

    def __init__(
        self,
        incoming: int,
        outgoing: int,
        pack: Callable[[str, Any], bytes],
        unpack: Callable[[bytes], tuple[str, Any]],
        serve: Callable[[str, tuple[Any, ...], dict[str, Any]], Any],
        asks_first: bool,
    ) -> None:
        self.incoming, self.outgoing = incoming, outgoing
        self.pack, self.unpack, self.serve = pack, unpack, serve
        self.asks_first = asks_first
        self.lock = RLock()  # a thread that asks holds the channel until it has the answer
        self.asking = self.answering = 0
        self.busy_thread: int | None = None  # reads or writes values, so it can't ask now

    def ask(self, operation: str, *operands: Any, **options: Any) -> Any:
        """Asks the other side for an operation; returns its result or raises its exception."""
        with self.lock:
            if self.is_busy() or not (self.answering or self.asks_first):
                raise RuntimeError("the other side is not answering now")
            if self.asking >= MAX_NESTED_QUESTIONS:
                raise RecursionError("the program and its tests call each other too often")
            self.asking += 1
            try:
                self.write("ask", (operation, operands, tuple(options.items())))
                while True:
                    kind, content = self.read()
                    if kind == "give":
                        return content
                    if kind == "raise":
                        raise content.with_traceback(None)
                    self.answer(content)
            finally:
                self.asking -= 1

    def is_busy(self) -> bool:
        return self.busy_thread == get_ident()

    def answer_next(self) -> None:
        kind, content = self.read()
        if kind != "ask":
            exit_process()
        self.answer(content)

    def answer(self, question: Any) -> None:
        kind, content = "give", None
        self.answering += 1
        try:
            operation, operands, options = question
            content = self.serve(operation, operands, dict(options))
        except BaseException as error:  # noqa: BLE001 - the side that asked gets SystemExit, too
            kind, content = "raise", error
        with self.lock:
            self.answering -= 1
            try:
                self.write(kind, content)
            except Exception as error:  # noqa: BLE001 - whatever a value's own methods raise
                self.write("raise", TypeError(f"no answer can be sent ({type(error).__name__})"))

    def write(self, kind: str, content: Any) -> None:
        self.busy_thread = get_ident()
        try:
            message = self.pack(kind, content)
            if len(message) > MAX_MESSAGE_BYTES:
                raise ValueError(f"{len(message)} bytes are too many for one message")
        finally:
            self.busy_thread = None
        rest = memoryview(len(message).to_bytes(4, "little") + message)
        try:
            while rest:
                rest = rest[os.write(self.outgoing, rest) :]
        except BaseException:  # noqa: BLE001 - part of the message is already sent
            exit_process()

    def read(self) -> tuple[str, Any]:
        try:
            size = int.from_bytes(self.read_bytes(4), "little")
            if size > MAX_MESSAGE_BYTES:
                exit_process()
            self.busy_thread = get_ident()
            kind, content = self.unpack(self.read_bytes(size))
            self.busy_thread = None
            if kind in ("give", "ask") or (kind == "raise" and isinstance(content, BaseException)):
                return kind, content
        except BaseException:  # noqa: BLE001 - this is not a message
            exit_process()
        return exit_process()

    def read_bytes(self, count: int) -> bytes:
        parts = []
        while count:
            part = os.read(self.incoming, min(count, 1 << 20))
            if not part:
                exit_process()
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


def exit_process() -> NoReturn:
    os._exit(1)
