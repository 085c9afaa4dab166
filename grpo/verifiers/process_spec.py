"""Where a process of the code reward runs, and what it is held to."""

from __future__ import annotations

from typing import NamedTuple


class ProcessSpec(NamedTuple):
    """Where and as what a process runs."""

    parent: int  # the process that started this one
    folder: str  # the one that files can be written in
    role: str  # script, program or tests, see `sandbox.py`
    source_fd: int  # descriptor: the program, or the tests
    incoming: int = -1  # descriptor: the pipe from the other process
    outgoing: int = -1  # descriptor: the pipe to it
    results: int = -1  # descriptor: a byte for each test that passes


class SandboxLimits(NamedTuple):
    """What every process is held to."""

    seconds: float
    memory_mb: int
    file_mb: int
    landlock: int  # its version; 0 where there is none
