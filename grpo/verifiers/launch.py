"""Starts `sandbox.py` for one program, waits for it, and leaves nothing of it behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from grpo.verifiers import sandbox

INTERPRETER = (sys.executable, "-s", "-S", "-X", "utf8")  # no packages but Python's own
ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # a set's order decides no reward


class CannotRun(Exception):
    """A program could not be run, which is not its fault."""


class Run(NamedTuple):
    exit_code: int  # negative: the signal that ended it
    printed: bytes
    results: bytes  # 32 bytes a test, see sandbox.run_tests


def launch(exam: Sequence[bytes], limits: sandbox.Limits, given: bytes | None) -> Run:
    """Runs one program in a process and a folder of its own, both gone afterwards.

    Args:
        exam: the program, then each test and its token.
        given: what the program reads; what it prints is kept. None: it is tested instead.

    Raises:
        CannotRun: the process could not be started, or could not be confined.
    """
    framed = b"".join(len(frame).to_bytes(4, "little") + frame for frame in exam)
    try:
        with (
            memory_file(framed) as exam_file,
            memory_file(given or b"") as given_file,
            memory_file(b"") as printed,
            memory_file(b"") as results,
            tempfile.TemporaryDirectory(prefix="grpo-code-") as folder,
        ):
            place = sandbox.Place(
                os.getpid(), folder, exam_file, results if given is None else None
            )
            exit_code = run_process(place, limits, given_file, printed)
            most = limits.file_mb << 20
            return Run(exit_code, os.pread(printed, most, 0), os.pread(results, most, 0))
    except OSError as error:
        raise CannotRun(f"{type(error).__name__}: {error}") from error


def run_process(place: sandbox.Place, limits: sandbox.Limits, given: int, printed: int) -> int:
    tested = place.results is not None
    process = subprocess.Popen(
        [*INTERPRETER, sandbox.__file__, json.dumps([place._asdict(), limits._asdict()])],
        stdin=given,
        stdout=subprocess.DEVNULL if tested else printed,
        stderr=subprocess.PIPE,
        pass_fds=[fd for fd in (place.exam, place.results) if fd is not None],
        cwd=place.folder,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    assert process.stderr is not None
    with process.stderr:
        try:
            status = process.stderr.readline()
            if status != b"ready\n":
                raise CannotRun(status.decode(errors="replace").strip() or "no word from it")
            deadline = time.monotonic() + limits.seconds
            while time.monotonic() < deadline and size(place.folder) <= limits.file_mb << 20:
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(0.05)
        finally:
            process.kill()  # it is one process, so this is all of it
            process.wait()
    return process.returncode


def size(folder: str) -> int:
    """Bytes that a flat folder's files take, a block each at least."""
    total = 0
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):
            total += 4096 + entry.stat(follow_symlinks=False).st_size
    return total


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
