"""Runs one Python program that nobody has read, and its tests. A script: `launch.py` starts it
once a program, with Python's standard library alone, and kills it when its time is over.

What holds for the program, for root and any other user, in a container or not:

- It is one process. It can't start another, run another program, signal, trace or reschedule
  another, or tell the kernel to; so killing this process ends all of it. (seccomp)
- It has no network: no socket can be made but a pair between its own threads. (seccomp)
- It reads Python's own folder, the system's libraries and its own folder, nothing else. It writes
  files in its own folder, without subfolders, nowhere else. It can't change the mode, owner, times
  or attributes of any file. (Landlock and seccomp)
- It is nobody: root gives up its user for one that no other process has, and all capabilities but
  the one to read past file modes, since root's Python may lie in root's folder. (no_new_privs)
- CPU time, address space, threads and the size of a file are limited. (rlimits)
- It is killed when the thread that started it dies. (PR_SET_PDEATHSIG)

This takes Linux on x86-64 or arm64, and neither privileges nor namespaces. Landlock can hold writes
in from Linux 6.2 on. Where it can't (older kernels, containers that refuse it), seccomp lets the
program write no file at all; where there is no Landlock whatever (before 5.13) it reads what the
user may read. Threads are counted by user, so a user who is not root, and may not make a user
namespace either, gives the program as many as are left of 64, which may be none; root who can't
change its user, none. Where seccomp is refused too, or on another system, nothing is run.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import site
import struct
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from typing import NamedTuple

TOKEN = 16  # bytes
OPEN_FILES = 64
THREADS = 64
SYSTEM = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom")

# Linux's numbers of system calls, on x86-64 and arm64.
Calls = dict[str, tuple[int | None, int | None]]
REFUSED: Calls = {  # never allowed
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "unshare": (272, 97), "setns": (308, 268), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "kcmp": (312, 272), "setpriority": (141, 140),
    "ioprio_set": (251, 30), "sched_setaffinity": (203, 122), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "sched_setattr": (314, 274), "migrate_pages": (256, 238),
    "move_pages": (279, 239), "socket": (41, 198), "connect": (42, 203), "bind": (49, 200),
    "io_uring_setup": (425, 425), "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195),
    "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187),
    "semget": (64, 190), "semop": (65, 193), "semtimedop": (220, 192), "semctl": (66, 191),
    "mq_open": (240, 180), "mq_unlink": (241, 181), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "prctl": (157, 167),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "truncate": (76, 45),
    "open_by_handle_at": (304, 265),
}  # fmt: skip
WRITING: Calls = {  # refused where Landlock can't hold them in
    "creat": (85, None), "mkdir": (83, None), "mkdirat": (258, 34), "mknod": (133, None),
    "mknodat": (259, 33), "unlink": (87, None), "unlinkat": (263, 35), "rmdir": (84, None),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "link": (86, None),
    "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "openat2": (437, 437),
}  # fmt: skip
CHECKED: Calls = {  # allowed by their arguments
    "clone": (56, 220), "kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261),
    "socketpair": (53, 199), "fcntl": (72, 25), "ioctl": (16, 29), "open": (2, None),
    "openat": (257, 56),
}  # fmt: skip
UNKNOWN: Calls = {  # answered as a kernel without them would
    "clone3": (435, 435),
}  # fmt: skip

NEWEST = 450  # later calls are answered as unknown: what they might allow is not known here


def main() -> None:
    """Takes its limits from the command line; says "ready", or in one line why it isn't."""
    place, limits = json.loads(sys.argv[1])
    place = Place(**place)
    try:
        confine(place, Limits(**limits))
        os.write(2, b"ready\n")
    except Exception as error:  # noqa: BLE001 - whatever it is, nothing may run then
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 2)
    sys.argv = ["answer.py"]
    sys.path[0] = place.folder  # where the program would be, instead of this script's
    site.setquit()  # exit and quit, which Python without its site-packages leaves out
    site.setcopyright()
    site.sethelper()
    if place.results is None:
        run_program(frames(place.exam))
    else:
        run_tests(frames(place.exam), place.results)


class Place(NamedTuple):
    """Where one program runs."""

    parent: int  # the process that started this one
    folder: str
    exam: int  # descriptor: the program, then each test and its token
    results: int | None  # descriptor: 32 bytes a test. None: the program talks by stdin and stdout


class Limits(NamedTuple):
    """What every program is held to."""

    seconds: float
    memory_mb: int
    file_mb: int
    landlock: int  # its version; 0 where there is none


def run_program(exam: Iterator[bytes]) -> None:
    """The program as `python answer.py` would run it; how it ends is how this process ends."""
    module = new_module("__main__")
    exec(compile_source(next(exam), "answer.py"), module.__dict__)


def run_tests(exam: Iterator[bytes], results: int) -> None:
    """The program, imported, then each test in the same module; writes down the hash of the token
    of each test that ran through. A token is read only after its test, so that while the program
    runs none is in this process's memory, its source, its arguments or its environment.
    """
    # Names of our own, because the program may put others in place of these.
    compile_, exec_, next_, pwrite, hashed = compile_source, exec, next, os.pwrite, sha256
    leave = os._exit
    module = new_module("answer")
    sys.modules["solution"] = module  # what many tests import it as
    program, tests = next(exam), enumerate(exam)
    try:
        exec_(compile_(program, "answer.py"), module.__dict__)
    except BaseException:  # noqa: BLE001 - sys.exit too: a program that leaves has passed nothing
        leave(1)
    for number, test in tests:
        try:
            exec_(compile_(test, "test.py"), module.__dict__)
        except BaseException:  # noqa: BLE001
            next_(exam)
        else:
            pwrite(results, hashed(next_(exam)).digest(), 32 * number)
    leave(0)


def compile_source(
    source: bytes, name: str, compile: Callable[..., types.CodeType] = compile
) -> types.CodeType:
    """A text as Python: none of this file's own `from __future__`, and no other encoding."""
    return compile(source.decode("utf-8-sig"), name, "exec", dont_inherit=True)


def frames(exam: int) -> Iterator[bytes]:
    """The program, then each test and its token, each after its length in 4 bytes."""
    read = os.read
    while size := read(exam, 4):
        yield read(exam, int.from_bytes(size, "little"))


def new_module(name: str) -> types.ModuleType:
    sys.modules[name] = module = types.ModuleType(name)
    module.__file__ = os.path.abspath("answer.py")
    return module


def confine(place: Place, limits: Limits) -> None:
    """Everything that the head of this file promises.

    Raises:
        OSError: the kernel refuses; the program must not be run.
    """
    counted = as_nobody(place.folder)
    set_limits(limits)
    libc_call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    libc_call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != place.parent:
        raise OSError("the process that started it is gone")
    if limits.landlock:
        hold_in(place.folder, limits.landlock)
    filter_calls(may_write=holds_writes(limits.landlock), may_thread=counted)


def as_nobody(folder: str) -> bool:
    """Gives up who started it. Whether a limit on threads holds: for root it wouldn't."""
    if os.geteuid() != 0:
        with suppress(OSError):
            libc_call("unshare", 0x10000000)  # CLONE_NEWUSER: threads are counted in there
        keep_capability(0)
        return True
    for user in (2**30 + os.getpid(), 65534):  # the second where few users are mapped
        with suppress(OSError):
            os.chown(folder, user, user)
            libc_call("prctl", 8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            break
    # CAP_DAC_READ_SEARCH, or in containers that don't have it CAP_DAC_OVERRIDE.
    keep_capability(0b100, 0b010)
    return os.geteuid() != 0


def keep_capability(*choices: int) -> None:
    """Drops every capability but the first of these that there is."""
    header, state = struct.pack("=Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    libc_call("capget", header, state)
    _, permitted, *_ = struct.unpack("=6I", state.raw)
    kept = next((choice for choice in choices if choice & permitted), 0)
    libc_call("capset", header, struct.pack("=6I", kept, kept, 0, 0, 0, 0))


def set_limits(limits: Limits) -> None:
    for kind, limit in (
        (resource.RLIMIT_CPU, int(limits.seconds) + 1),
        (resource.RLIMIT_AS, limits.memory_mb << 20),
        (resource.RLIMIT_FSIZE, limits.file_mb << 20),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_NPROC, THREADS),
        (resource.RLIMIT_CORE, 0),
    ):
        most = resource.getrlimit(kind)[1]
        limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
        resource.setrlimit(kind, (limit, limit))


def libc_call(name: str, *arguments: object) -> int:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    function.restype = ctypes.c_long
    result = function(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}{arguments}: {os.strerror(code)}")
    return int(result)


# Landlock: https://docs.kernel.org/userspace-api/landlock.html

WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REG, TRUNCATE = (
    1 << bit for bit in (1, 2, 3, 5, 8, 14)
)
ON_FILES = WRITE_FILE | READ_FILE | TRUNCATE


def landlock_version() -> int:
    """The kernel's version of Landlock, 0 where there is none.

    Raises:
        OSError: this is no system that a program can be confined on.
    """
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        raise OSError(f"{sys.platform} on {platform.machine()}: needs Linux on x86-64 or arm64")
    try:
        return libc_call("syscall", 444, None, 0, 1)
    except (OSError, AttributeError):
        return 0


def holds_writes(version: int) -> bool:
    return version >= 3  # before, it doesn't see a file being cut to nothing


def hold_in(folder: str, version: int) -> None:
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    ruleset = libc_call("syscall", 444, struct.pack("=Q", handled), 8, 0)
    readable = (sys.base_prefix, sys.base_exec_prefix, *SYSTEM)
    rights = dict.fromkeys(readable, READ_FILE | READ_DIR)
    rights[os.devnull] = ON_FILES
    rights[folder] = ON_FILES | READ_DIR | REMOVE_FILE | MAKE_REG
    for path, allowed in rights.items():
        if os.path.exists(path):
            place = os.open(path, os.O_PATH)
            allowed &= handled if os.path.isdir(path) else handled & ON_FILES
            libc_call("syscall", 445, ruleset, 1, struct.pack("=Qi", allowed, place), 0)
            os.close(place)
    libc_call("syscall", 446, ruleset, 0)
    os.close(ruleset)


# seccomp: https://docs.kernel.org/userspace-api/seccomp_filter.html

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH
LOAD, EQUAL, GREATER, ANY_BIT, RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
ALLOW, KILL = 0x7FFF0000, 0x80000000
DENY, NOT_THERE = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
Instruction = tuple[int, int, int, int]  # operation, jump if true, jump if false, operand


def filter_calls(may_write: bool, may_thread: bool) -> None:
    """Has the kernel refuse every call that leads out of this process."""
    column, architecture = ARCHITECTURES[platform.machine()]
    itself = os.getpid()
    program: list[Instruction] = [
        *((LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL)),
        *((LOAD, 0, 0, 0), (GREATER, 0, 1, NEWEST), (RETURN, 0, 0, NOT_THERE)),
    ]

    def add(name: str, *then: Instruction) -> None:
        number = {**REFUSED, **WRITING, **CHECKED, **UNKNOWN}[name][column]
        if number is not None:
            program.extend([(EQUAL, 0, len(then), number), *then])

    def check(name: str, argument: int, test: int, values: list[int], allow: bool) -> None:
        """Allows or refuses a call where an argument meets one of the values."""
        tests = [(test, len(values) - n, 0, value) for n, value in enumerate(values)]
        met, unmet = (ALLOW, DENY) if allow else (DENY, ALLOW)
        load = (LOAD, 0, 0, 16 + 8 * argument)
        add(name, load, *tests, (RETURN, 0, 0, unmet), (RETURN, 0, 0, met))

    for name in REFUSED if may_write else {**REFUSED, **WRITING}:
        add(name, (RETURN, 0, 0, DENY))
    for name in UNKNOWN:  # glibc then falls back on clone, whose flags can be looked at
        add(name, (RETURN, 0, 0, NOT_THERE))
    check("clone", 0, ANY_BIT, [0x10000] if may_thread else [], allow=True)  # CLONE_THREAD
    check("kill", 0, EQUAL, [itself], allow=True)
    check("tgkill", 0, EQUAL, [itself], allow=True)
    check("prlimit64", 0, EQUAL, [0], allow=True)  # of itself
    check("socketpair", 1, ANY_BIT, [0xE], allow=False)  # all types but SOCK_STREAM
    check("fcntl", 1, EQUAL, [8, 15], allow=False)  # F_SETOWN(_EX): signals by way of a file
    # FIOSETOWN, SIOCSPGRP, TIOCSTI; a file's attributes (FS_IOC_SETFLAGS, its 32 bits, FSSETXATTR)
    owners, attributes = [0x8901, 0x8902, 0x5412], [0x40086602, 0x40046602, 0x401C5820]
    check("ioctl", 1, EQUAL, owners + attributes, allow=False)
    if not may_write:
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        check("open", 1, ANY_BIT, [writes], allow=False)
        check("openat", 2, ANY_BIT, [writes], allow=False)
    program.append((RETURN, 0, 0, ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    pointer = struct.pack("@HP", len(program), ctypes.addressof(code))
    libc_call("prctl", 22, 2, pointer, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


if __name__ == "__main__":
    main()
