"""Starts `sandbox.py` for a program, and again for its tests; removes all that they leave."""

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
from grpo.verifiers.process_spec import ProcessSpec, SandboxLimits

INTERPRETER = (
    sys.executable,
    "-s",
    "-S",
    "-X",
    "utf8",
)  # no packages, only Python's standard library
SANDBOX_ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # the order of a set must not decide a reward


class SandboxError(Exception):
    """A program could not be run, for a reason outside of it."""


class ScriptResult(NamedTuple):
    exit_code: int  # negative: minus the signal that ended it
    printed: bytes


class GraderArguments(NamedTuple):
    """The arguments of `grader_process.run_pieces`."""

    pieces: Sequence[str]
    reserved: Sequence[str]
    passes_errors: bool


class Sandbox(NamedTuple):
    process: subprocess.Popen[bytes]
    folder: str


def run_script(program: bytes, script_input: bytes, limits: SandboxLimits) -> ScriptResult:
    """Runs a program by itself, with an input to read; returns its exit code and its output.

    Raises:
        SandboxError: the process could not be started, or could not be confined.
    """
    try:
        with ExitStack() as held:
            files = [held.enter_context(memory_file(text)) for text in (program, script_input, b"")]
            source, stdin, printed = files
            script = held.enter_context(running_sandbox("script", source, limits, stdin, printed))
            exit_code = wait_for_exit(script, [script], limits)
            return ScriptResult(exit_code, os.pread(printed, limits.file_mb << 20, 0))
    except OSError as error:
        raise SandboxError(f"{type(error).__name__}: {error}") from error


def run_tests(program: bytes, arguments: GraderArguments, limits: SandboxLimits) -> list[bool]:
    """Runs tests in one process, of a program in another; returns whether each piece passed.

    The processes have two pipes between them and nothing else.

    Raises:
        SandboxError: a process could not be started, or could not be confined.
    """
    pieces = len(arguments.pieces)
    encoded = json.dumps(arguments._asdict()).encode()
    try:
        with ExitStack() as held:
            files = [held.enter_context(memory_file(text)) for text in (program, encoded, b"")]
            source, questions, results = files
            with open_pipe() as asked, open_pipe() as answered:
                tested = held.enter_context(
                    running_sandbox(
                        "program", source, limits, incoming=asked[0], outgoing=answered[1]
                    )
                )
                tests = held.enter_context(
                    running_sandbox(
                        *("tests", questions, limits),
                        incoming=answered[0],
                        outgoing=asked[1],
                        results=results,
                    )
                )
            wait_for_exit(tests, [tested, tests], limits)
            passed = os.pread(results, pieces, 0).ljust(pieces, b"\0")
            return [byte == 1 for byte in passed]
    except OSError as error:
        raise SandboxError(f"{type(error).__name__}: {error}") from error


@contextmanager
def running_sandbox(
    role: str,
    source_fd: int,
    limits: SandboxLimits,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    **descriptors: int,
) -> Iterator[Sandbox]:
    """Starts a process in a folder of its own; kills the process and deletes the folder after."""
    with tempfile.TemporaryDirectory(prefix="grpo-code-") as folder:
        spec = ProcessSpec(os.getpid(), folder, role, source_fd, **descriptors)
        process = subprocess.Popen(
            [*INTERPRETER, sandbox.__file__, json.dumps([spec._asdict(), limits._asdict()])],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            pass_fds=[source_fd, *descriptors.values()],
            cwd=folder,
            env=SANDBOX_ENVIRONMENT,
            start_new_session=True,
        )
        assert process.stderr is not None
        with process.stderr:
            try:
                yield Sandbox(process, folder)
            finally:
                process.kill()  # it can't have started other processes
                process.wait()


def wait_for_exit(last: Sandbox, started: Sequence[Sandbox], limits: SandboxLimits) -> int:
    """Waits for the exit code of `last`; kills it if time or disk space runs out first.

    Raises:
        SandboxError: a process could not be confined.
    """
    for process, _ in started:
        assert process.stderr is not None
        status = process.stderr.readline()
        if status != b"ready\n":
            raise SandboxError(
                status.decode(errors="replace").strip() or "the process ended without a message"
            )
    deadline = time.monotonic() + limits.seconds
    most = limits.file_mb << 20
    while time.monotonic() < deadline and all(
        count_folder_bytes(folder) <= most for _, folder in started
    ):
        with suppress(subprocess.TimeoutExpired):
            return last.process.wait(0.05)
    last.process.kill()
    return last.process.wait()


def count_folder_bytes(folder: str) -> int:
    """Counts the bytes of a flat folder's files, plus a block of 4096 for each."""
    total = 0
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):
            total += 4096 + entry.stat(follow_symlinks=False).st_size
    return total


@contextmanager
def open_pipe() -> Iterator[tuple[int, int]]:
    """Opens a pipe, (read end, write end), and closes both here once other processes have them."""
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


@contextmanager
def memory_file(content: bytes) -> Iterator[int]:
    """Opens a file in memory with this content; yields its descriptor, at the start."""
    descriptor = os.memfd_create("grpo-code")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)
