"""The process of a program that is tested by calls: imports the program, then does what the
grader asks for. The program can change everything in this process.
"""

from __future__ import annotations

import sys
import types

from grpo.verifiers.channel import exit_process
from grpo.verifiers.operations import OPERATIONS, copy_contents
from grpo.verifiers.proxy import Peer
from grpo.verifiers.standard_library import (
    CATCH_ALL_EXCEPTIONS,
    find_class,
    find_import,
    import_from_library,
    list_streams,
)

TYPE_CHECKING = False  # see confine.py
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Names = list[tuple[str, str, Any]]


class ProgramServer(Peer):
    """Serves an imported program to the grader."""

    def __init__(
        self, code: types.CodeType, module: types.ModuleType, incoming: int, outgoing: int
    ) -> None:
        super().__init__(1, incoming, outgoing, asks_first=False)
        self.code, self.module = code, module
        self.known_names: dict[str, Any] | None = None  # as the grader knows them
        self.loop: Any = None
        self.streams = list_streams()
        self.operations: dict[str, Callable[..., Any]] = {
            **OPERATIONS,
            "names": self.import_program,
            "run": self.run_coroutine,
            "contents": copy_contents,
        }

    def serve(self, operation: str, operands: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return self.operations[operation](*operands, **options)

    def find_name(self, value: Any) -> tuple[str, str] | None:
        place = find_class(value)
        return None if place in CATCH_ALL_EXCEPTIONS else place

    def import_name(self, module: str, name: str) -> Any:
        return import_from_library(module, name)

    def import_program(self) -> Names:
        """Runs the program; returns its names and how the grader gets each.

        The grader asks for this first, when its own process is already closed to the program's.
        """
        sys.modules["solution"] = self.module  # the name that many tests import it by
        try:
            exec(self.code, vars(self.module))
        except BaseException:  # noqa: BLE001 - a program that exits passes no test
            exit_process()
        self.known_names = {}
        names: Names = []
        for name, value in self.collect_names().items():
            place = find_import(name, value)
            if place:
                names.append((name, "import", place))
            elif not isinstance(value, types.ModuleType):
                names.append((name, "value", value))
            self.known_names[name] = value
        return names

    def collect_extra(self) -> Any:
        """Returns the names that have a new value since the last message."""
        if self.known_names is None:
            return None
        changed: list[Any] = []
        for name, value in self.collect_names().items():
            known = name in self.known_names and self.known_names[name] is value
            if not known and not isinstance(value, types.ModuleType):
                self.known_names[name] = value
                changed += (name, value)
        return tuple(changed) or None

    def apply_extra(self, extra: Any) -> None:
        if extra is not None:
            for name, (place, usual) in self.streams.items():
                setattr(place, name, dict(extra).get(name, usual))

    def collect_names(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in vars(self.module).items()
            if not (name.startswith("__") and name.endswith("__"))
        }

    def run_coroutine(self, coroutine: Any) -> Any:
        """Runs a coroutine to its end, in one loop that the program's objects can share."""
        import asyncio  # slow to import, and few programs need it

        if self.loop is None:
            self.loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self.loop)
        return self.loop.run_until_complete(coroutine)


def serve_program(
    code: types.CodeType, module: types.ModuleType, incoming: int, outgoing: int
) -> None:
    """Imports the program, then serves the grader until its process ends."""
    program = ProgramServer(code, module, incoming, outgoing)
    while True:
        program.channel.answer_next()
