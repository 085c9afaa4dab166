"""Runs what nobody has read in a process that can do no harm: a Python program by itself, a program
that its tests call, or those tests. A script: `launch.py` starts it, with Python's standard library
alone, and kills it when its time is over.

What holds for the process, for root and any other user, in a container or not:

- It is one process. It can't start another, run another program, signal, trace or reschedule
  another, or tell the kernel to; so killing this process ends all of it. (seccomp)
- It has no network: no socket can be made but a pair between its own threads. (seccomp)
- It reads Python's own folder, the system's libraries and its own folder, nothing else. It writes
  files in its own folder, without subfolders, nowhere else. It can't change the mode, owner, times
  or attributes of any file. (Landlock and seccomp)
- It is nobody: root gives up its user for one that no other process has, and all capabilities but
  the one to read past file modes, since root's Python may lie in root's folder. (no_new_privs)
- Its memory and descriptors are closed to another one of the same user. (PR_SET_DUMPABLE)
- CPU time, address space, threads and the size of a file are limited. (rlimits)
- It is killed when the thread that started it dies. (PR_SET_PDEATHSIG)

This takes Linux on x86-64 or arm64, and neither privileges nor namespaces. Landlock can hold writes
in from Linux 6.2 on. Where it can't (older kernels, containers that refuse it), seccomp lets the
process write no file at all; where there is no Landlock whatever (before 5.13) it reads what the
user may read. Threads are counted by user, so a user who is not root, and may not make a user
namespace either, gives the process as many as are left of 64, which may be none; root who can't
change its user, none. Where seccomp is refused too, or on another system, nothing is run.

A program and its tests in Python are two such processes with two pipes between them. Both have the
ends of these, a folder of their own, and a file in memory: the program's has its text, that of the
tests has theirs. A third file, to which the tests' process writes which of them passed, is open
there alone. The program is run when the tests' process is closed to it. `grader.py` says what it
learns of the tests, and what it decides.
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
    """Takes its place and limits from the command line; says "ready", or in one line why not."""
    sys.path[0] = os.path.abspath(f"{__file__}/../../..")  # where this package is
    from grpo.verifiers.confine import confine

    spec: Any  # as in place.py
    limits: Any
    spec, limits = (types.SimpleNamespace(**given) for given in json.loads(sys.argv[1]))
    if spec.role == "program":  # while there is still a folder to import from
        from grpo.verifiers.program_process import serve_program
    elif spec.role == "tests":
        from grpo.verifiers.grader_process import run_pieces
    try:
        confine(spec, limits)
        os.write(2, b"ready\n")
    except Exception as error:  # noqa: BLE001 - whatever it is, nothing may run then
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 2)
    sys.argv = ["answer.py"]
    sys.path[0] = spec.folder  # where the program would be, instead of this script's
    site.setquit()  # exit and quit, which Python without its site-packages leaves out
    site.setcopyright()
    site.sethelper()
    with open(spec.source_fd, "rb") as file:
        given = file.read()
    if spec.role == "script":
        exec(compile_program(given), create_module("__main__").__dict__)
    elif spec.role == "program":
        serve_program(compile_program(given), create_module("answer"), spec.incoming, spec.outgoing)
    else:
        run_pieces(**json.loads(given), module=create_module("answer"), spec=spec)


def compile_program(text: bytes) -> types.CodeType:
    """A text as Python: none of this file's own `from __future__`, and no other encoding."""
    return compile(text.decode("utf-8-sig"), "answer.py", "exec", dont_inherit=True)


def create_module(name: str) -> types.ModuleType:
    sys.modules[name] = module = types.ModuleType(name)
    module.__file__ = os.path.abspath("answer.py")
    return module


if __name__ == "__main__":
    main()
