"""The grader's process: runs the tests of a program that is in another process."""

from __future__ import annotations

import os
import sys
import types

from grpo.verifiers.channel import exit_process
from grpo.verifiers.grader import Grader
from grpo.verifiers.standard_library import SHARED_CLASSES

TYPE_CHECKING = False  # see confine.py
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

    from grpo.verifiers.process_spec import ProcessSpec


def run_pieces(
    pieces: Sequence[str],
    reserved: Sequence[str],
    passes_errors: bool,
    module: types.ModuleType,
    spec: ProcessSpec,
) -> NoReturn:
    """Runs each piece of the tests and writes a byte for each that runs to its end; then exits.

    Args:
        pieces: Python, run one after the other in one module.
        reserved: see `Grader`.
        passes_errors: see `Grader`.
        module: an empty module, to run them in.
        spec: has the pipes and the file of results.
    """
    sys.modules["solution"] = module  # the name that many tests import it by
    sys.setrecursionlimit(4000)  # tests and program that call each other need more
    Grader(module, reserved, passes_errors, spec.incoming, spec.outgoing)
    guard_texts(module, "\n".join(pieces))
    for number, piece in enumerate(pieces):
        try:
            exec(compile(piece, "test.py", "exec", dont_inherit=True), vars(module))
        except BaseException:  # noqa: BLE001 - sys.exit must not pass, either
            continue
        os.pwrite(spec.results, b"\1", number)
    exit_process()


def guard_texts(module: types.ModuleType, tests: str) -> None:
    """Lets tests run only texts that are written in them, and none from the program."""

    def check(text: Any) -> None:
        if isinstance(text, bytes | bytearray):
            text = bytes(text).decode(errors="replace")
        if isinstance(text, str) and str.__str__(text) not in tests:
            raise TypeError("tests can't run a text that is not written in them")

    def guard(run: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(text: Any, *spaces: Any) -> Any:
            check(text)
            frame = sys._getframe(1)
            return run(text, *(spaces or (frame.f_globals, frame.f_locals)))

        return guarded

    def guarded_compile(text: Any, *options: Any, **named: Any) -> Any:
        check(text)
        return compile(text, *options, **named)

    def check_pickle(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class" and tuple(arguments) not in SHARED_CLASSES:
            space, name = arguments
            defined = vars(module).get(name) if space == module.__name__ else None
            if not isinstance(defined, type):
                raise TypeError(f"tests can't unpickle {space}.{name}")

    sys.addaudithook(check_pickle)
    vars(module).update(eval=guard(eval), exec=guard(exec), compile=guarded_compile)
