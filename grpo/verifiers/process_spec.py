"""Where a process of the code reward runs, and its limits."""

from __future__ import annotations

from typing import NamedTuple


class ProcessSpec(NamedTuple):
    """The place, the role and the descriptors of a process."""

    parent: int  # id of the process that started this one
    folder: str  # the only one that it can write files in
    role: str  # script, program or tests, see `sandbox.py`
    source_fd: int  # descriptor: the program, or the tests
    incoming: int = -1  # descriptor: the pipe from the other process
    outgoing: int = -1  # descriptor: the pipe to it
    results: int = -1  # descriptor: a byte for each test that passes


class SandboxLimits(NamedTuple):
    """The limits of every process."""

    seconds: float
    memory_mb: int
    file_mb: int
    landlock: int  # version of Landlock; 0: none
