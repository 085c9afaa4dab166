"""Carries questions and answers between a program and its grader, over two pipes.

One side asks, the other answers; before it does it may ask back, and so on. A side that finds the
other gone, or reads anything but a message, leaves at once: no test after that has passed.
"""

from __future__ import annotations

import os
from _thread import RLock, get_ident

TYPE_CHECKING = False  # see confine.py
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

MAX_MESSAGE_BYTES = 32 << 20  # bytes of one message
MAX_NESTED_QUESTIONS = 50  # questions that wait for each other


class Channel:
    """One end of the two pipes.

    Args:
        incoming: descriptor of the pipe to read.
        outgoing: descriptor of the pipe to write.
        pack: writes what kind of message it is, and its content; or raises and changes nothing.
        unpack: both again; where it raises, this process leaves.
        serve: does what the other side asks for: an operation, its operands and options.
        asks_first: whether this side may ask while it answers nothing.
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
        self.lock = RLock()  # a thread that asks has the channel until it is answered
        self.asking = self.answering = 0
        self.busy_thread: int | None = (
            None  # the thread that writes or reads values: it can't ask meanwhile
        )

    def ask(self, operation: str, *operands: Any, **options: Any) -> Any:
        """What the other side's operation gives; raises what it raises."""
        with self.lock:
            if self.is_busy() or not (self.answering or self.asks_first):
                raise RuntimeError("nobody answers now")
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
        except BaseException as error:  # noqa: BLE001 - SystemExit too is for the side that asked
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
        except BaseException:  # noqa: BLE001 - half a message can't be taken back
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
        except BaseException:  # noqa: BLE001 - this is no message
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
