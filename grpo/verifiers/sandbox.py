"""Runs code that nobody has read in a process that can do no harm: a Python program by itself, a
program that its tests call, or those tests. This file is a script: `start_sandbox.py` starts it,
with Python's standard library alone, and kills it when its time is over.

The following holds for the process, for root and any other user, in a container or not:

- It is one process. It can't start another process or run another program; it can't signal, trace
  or reschedule another process, or make the kernel do so. So killing it ends everything. (seccomp)
- It has no network: it can make no socket but a pair between its own threads. (seccomp)
- It reads only Python's own folder, the system's libraries and its own folder. It writes files only
  in its own folder, without subfolders. It can't change the mode, owner, times or attributes of any
  file. (Landlock and seccomp)
- It has no privileges: root changes to a user that no other process has, and drops all capabilities
  but the one to read past file modes, since root's Python may be in root's folder. (no_new_privs)
- Other processes of the same user can't read its memory and descriptors. (PR_SET_DUMPABLE)
- CPU time, address space, threads and the size of a file are limited. (rlimits)
- It is killed when the thread that started it dies. (PR_SET_PDEATHSIG)

This needs Linux on x86-64 or arm64, but neither privileges nor namespaces. Landlock can restrict
writes to a folder from Linux 6.2 on. Where it can't (older kernels, containers that refuse it),
seccomp lets the process write no file at all. Without any Landlock (before 5.13), the process reads
what its user may read. Threads are counted per user. So if a user is not root and may not make a
user namespace, the process gets what is left of 64 threads, which may be none. If root can't change
its user, the process gets no threads. Where seccomp is refused, or on another system, nothing runs.

A program and its tests in Python are two such processes with two pipes between them. Each has its
ends of the pipes, a folder of its own, and a file in memory with its own text. A third file, where
the tests' process writes which tests passed, is open only there. The program runs after the tests'
process is closed to it. `grader.py` says what the program learns and decides.
"""

from __future__ import annotations

import json
import os
import site
import sys
import types

TYPE_CHECKING = False  # see confine.py
if TYPE_CHECKING:
    from typing import Any


def main() -> None:
    """Reads spec and limits from the command line; writes "ready", or an error, to stderr."""
    sys.path[0] = os.path.abspath(f"{__file__}/../../..")  # where this package is
    from grpo.verifiers.confine import confine

    spec: Any  # as in process_spec.py
    limits: Any
    spec, limits = (types.SimpleNamespace(**fields) for fields in json.loads(sys.argv[1]))
    if spec.role == "program":  # while this package can still be imported
        from grpo.verifiers.program_process import serve_program
    elif spec.role == "tests":
        from grpo.verifiers.grader_process import run_pieces
    try:
        confine(spec, limits)
        os.write(2, b"ready\n")
    except Exception as error:  # noqa: BLE001 - after any error, nothing may run
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 2)
    sys.argv = ["answer.py"]
    sys.path[0] = spec.folder  # the program's folder, instead of this script's
    site.setquit()  # exit and quit, which Python leaves out with -S
    site.setcopyright()
    site.sethelper()
    with open(spec.source_fd, "rb") as file:
        source = file.read()
    if spec.role == "script":
        exec(compile_program(source), create_module("__main__").__dict__)
    elif spec.role == "program":
        serve_program(
            compile_program(source), create_module("answer"), spec.incoming, spec.outgoing
        )
    else:
        run_pieces(**json.loads(source), module=create_module("answer"), spec=spec)


def compile_program(text: bytes) -> types.CodeType:
    """Compiles UTF-8 text without this file's own `from __future__`."""
    return compile(text.decode("utf-8-sig"), "answer.py", "exec", dont_inherit=True)


def create_module(name: str) -> types.ModuleType:
    sys.modules[name] = module = types.ModuleType(name)
    module.__file__ = os.path.abspath("answer.py")
    return module


if __name__ == "__main__":
    main()
