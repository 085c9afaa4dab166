"""Starts `sandbox.py` for a program, and again for its tests; leaves nothing of them behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

from grpo.verifiers import sandbox
from grpo.verifiers.place import Limits, Place

INTERPRETER = (sys.executable, "-s", "-S", "-X", "utf8")  # no packages but Python's own
ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # a set's order decides no reward


class CannotRun(Exception):
    """A program could not be run, which is not its fault."""


class Run(NamedTuple):
    exit_code: int  # negative: the signal that ended it
    printed: bytes


class Exam(NamedTuple):
    """The arguments of `exam.run_tests`."""

    pieces: Sequence[str]
    reserved: Sequence[str]
    passes_errors: bool


class Sandbox(NamedTuple):
    process: subprocess.Popen[bytes]
    folder: str


def run_script(program: bytes, given: bytes, limits: Limits) -> Run:
    """Runs a program by itself, which reads what is given and prints.

    Raises:
        CannotRun: the process could not be started, or could not be confined.
    """
    try:
        with ExitStack() as held:
            files = [held.enter_context(memory_file(text)) for text in (program, given, b"")]
            source, stdin, printed = files
            script = held.enter_context(start("script", source, limits, stdin, printed))
            exit_code = wait(script, [script], limits)
            return Run(exit_code, os.pread(printed, limits.file_mb << 20, 0))
    except OSError as error:
        raise CannotRun(f"{type(error).__name__}: {error}") from error


def run_tests(program: bytes, exam: Exam, limits: Limits) -> list[bool]:
    """Whether each piece of an exam passed: in one process, of a program in another.

    They have two pipes between them and nothing else.

    Raises:
        CannotRun: a process could not be started, or could not be confined.
    """
    pieces = len(exam.pieces)
    written = json.dumps(exam._asdict()).encode()
    try:
        with ExitStack() as held:
            files = [held.enter_context(memory_file(text)) for text in (program, written, b"")]
            source, questions, results = files
            with pipe() as asked, pipe() as answered:
                tested = held.enter_context(
                    start("program", source, limits, incoming=asked[0], outgoing=answered[1])
                )
                tests = held.enter_context(
                    start(
                        *("tests", questions, limits),
                        incoming=answered[0],
                        outgoing=asked[1],
                        results=results,
                    )
                )
            wait(tests, [tested, tests], limits)
            passed = os.pread(results, pieces, 0).ljust(pieces, b"\0")
            return [byte == 1 for byte in passed]
    except OSError as error:
        raise CannotRun(f"{type(error).__name__}: {error}") from error


@contextmanager
def start(
    role: str,
    given: int,
    limits: Limits,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    **descriptors: int,
) -> Iterator[Sandbox]:
    """A process in a folder of its own, both gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="grpo-code-") as folder:
        place = Place(os.getpid(), folder, role, given, **descriptors)
        process = subprocess.Popen(
            [*INTERPRETER, sandbox.__file__, json.dumps([place._asdict(), limits._asdict()])],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            pass_fds=[given, *descriptors.values()],
            cwd=folder,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        assert process.stderr is not None
        with process.stderr:
            try:
                yield Sandbox(process, folder)
            finally:
                process.kill()  # it is one process, so this is all of it
                process.wait()


def wait(last: Sandbox, started: Sequence[Sandbox], limits: Limits) -> int:
    """The exit code of the last one; that of a killed one, if their time or space is over first.

    Raises:
        CannotRun: one of them could not be confined.
    """
    for process, _ in started:
        assert process.stderr is not None
        status = process.stderr.readline()
        if status != b"ready\n":
            raise CannotRun(status.decode(errors="replace").strip() or "no word from it")
    deadline = time.monotonic() + limits.seconds
    most = limits.file_mb << 20
    while time.monotonic() < deadline and all(size(folder) <= most for _, folder in started):
        with suppress(subprocess.TimeoutExpired):
            return last.process.wait(0.05)
    last.process.kill()
    return last.process.wait()


def size(folder: str) -> int:
    """Bytes that a flat folder's files take, a block each at least."""
    total = 0
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):
            total += 4096 + entry.stat(follow_symlinks=False).st_size
    return total


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe's ends, to read and to write, here only until both are with who uses them."""
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


@contextmanager
def memory_file(content: bytes) -> Iterator[int]:
    """A descriptor of a file that is in memory alone, read from its start."""
    descriptor = os.memfd_create("grpo-code")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)
