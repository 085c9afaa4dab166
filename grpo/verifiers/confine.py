"""Confines the calling process, with Python's standard library alone, before it runs code that
nobody has read. `sandbox.py` lists what holds after that.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
import sys
from contextlib import suppress

TYPE_CHECKING = False  # `typing` takes longer to import than this whole module
if TYPE_CHECKING:
    from grpo.verifiers.process_spec import ProcessSpec, SandboxLimits

MAX_OPEN_FILES = 64
MAX_THREADS = 64
SYSTEM_PATHS = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom")

# The numbers of Linux's system calls on x86-64 and on arm64; None: no such call.
SystemCalls = dict[str, tuple[int | None, int | None]]
REFUSED_CALLS: SystemCalls = {  # never allowed
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
WRITING_CALLS: SystemCalls = {  # refused where Landlock can't restrict them to the folder
    "creat": (85, None), "mkdir": (83, None), "mkdirat": (258, 34), "mknod": (133, None),
    "mknodat": (259, 33), "unlink": (87, None), "unlinkat": (263, 35), "rmdir": (84, None),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "link": (86, None),
    "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "openat2": (437, 437),
}  # fmt: skip
CHECKED_CALLS: SystemCalls = {  # allowed or refused by their arguments
    "clone": (56, 220), "kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261),
    "socketpair": (53, 199), "fcntl": (72, 25), "ioctl": (16, 29), "open": (2, None),
    "openat": (257, 56),
}  # fmt: skip
UNKNOWN_CALLS: SystemCalls = {  # answered as if the kernel didn't have them
    "clone3": (435, 435),
}  # fmt: skip

NEWEST_CALL = 450  # later calls get the same answer, because what they allow is unknown


def confine(spec: ProcessSpec, limits: SandboxLimits) -> None:
    """Confines this process as the docstring of `sandbox.py` says.

    Raises:
        OSError: the kernel refuses; the caller must then run nothing.
    """
    threads_limited = drop_privileges(spec.folder)
    set_limits(limits)
    call_libc("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    call_libc("prctl", 1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
    call_libc("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: closes its /proc to its own user, too
    if os.getppid() != spec.parent:
        raise OSError("the process that started it has ended")
    if limits.landlock:
        restrict_files(spec.folder, limits.landlock)
    filter_system_calls(may_write=can_restrict_writes(limits.landlock), may_thread=threads_limited)


def drop_privileges(folder: str) -> bool:
    """Drops user and capabilities; returns whether a limit on threads holds, as not for root."""
    if os.geteuid() != 0:
        with suppress(OSError):
            call_libc("unshare", 0x10000000)  # CLONE_NEWUSER: counts threads separately
        keep_capability(0)
        return True
    for user in (2**30 + os.getpid(), 65534):  # the second id for where few users are mapped
        with suppress(OSError):
            os.chown(folder, user, user)
            call_libc("prctl", 8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            break
    # CAP_DAC_READ_SEARCH; CAP_DAC_OVERRIDE in containers without it.
    keep_capability(0b100, 0b010)
    return os.geteuid() != 0


def keep_capability(*choices: int) -> None:
    """Drops every capability but the first of `choices` that the process has."""
    header, state = struct.pack("=Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    call_libc("capget", header, state)
    _, permitted, *_ = struct.unpack("=6I", state.raw)
    kept = next((choice for choice in choices if choice & permitted), 0)
    call_libc("capset", header, struct.pack("=6I", kept, kept, 0, 0, 0, 0))


def set_limits(limits: SandboxLimits) -> None:
    for kind, limit in (
        (resource.RLIMIT_CPU, int(limits.seconds) + 1),
        (resource.RLIMIT_AS, limits.memory_mb << 20),
        (resource.RLIMIT_FSIZE, limits.file_mb << 20),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        (resource.RLIMIT_NPROC, MAX_THREADS),
        (resource.RLIMIT_CORE, 0),
    ):
        most = resource.getrlimit(kind)[1]
        limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
        resource.setrlimit(kind, (limit, limit))


def call_libc(name: str, *arguments: object) -> int:
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
FILE_RIGHTS = WRITE_FILE | READ_FILE | TRUNCATE


def detect_landlock_version() -> int:
    """Returns the kernel's version of Landlock; 0 if it has none.

    Raises:
        OSError: programs can't be confined on this system.
    """
    if sys.platform != "linux" or os.uname().machine not in ARCHITECTURES:
        raise OSError(f"{sys.platform} on {os.uname().machine}: needs Linux on x86-64 or arm64")
    try:
        return call_libc("syscall", 444, None, 0, 1)
    except (OSError, AttributeError):
        return 0


def can_restrict_writes(version: int) -> bool:
    return version >= 3  # earlier versions don't restrict truncation


def restrict_files(folder: str, version: int) -> None:
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    ruleset = call_libc("syscall", 444, struct.pack("=Q", handled), 8, 0)
    readable = (sys.base_prefix, sys.base_exec_prefix, *SYSTEM_PATHS)
    rights = dict.fromkeys(readable, READ_FILE | READ_DIR)
    rights[os.devnull] = FILE_RIGHTS
    rights[folder] = FILE_RIGHTS | READ_DIR | REMOVE_FILE | MAKE_REG
    for path, allowed in rights.items():
        if os.path.exists(path):
            place = os.open(path, os.O_PATH)
            allowed &= handled if os.path.isdir(path) else handled & FILE_RIGHTS
            call_libc("syscall", 445, ruleset, 1, struct.pack("=Qi", allowed, place), 0)
            os.close(place)
    call_libc("syscall", 446, ruleset, 0)
    os.close(ruleset)


# seccomp: https://docs.kernel.org/userspace-api/seccomp_filter.html

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH
LOAD, EQUAL, GREATER, ANY_BIT, RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
ALLOW, KILL = 0x7FFF0000, 0x80000000
DENY, NOT_THERE = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
Instruction = tuple[int, int, int, int]  # operation, jump if true, jump if false, operand


def filter_system_calls(may_write: bool, may_thread: bool) -> None:
    """Installs a filter that refuses every system call that reaches out of this process."""
    column, architecture = ARCHITECTURES[os.uname().machine]
    itself = os.getpid()
    program: list[Instruction] = [
        *((LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL)),
        *((LOAD, 0, 0, 0), (GREATER, 0, 1, NEWEST_CALL), (RETURN, 0, 0, NOT_THERE)),
    ]

    def add(name: str, *then: Instruction) -> None:
        number = {**REFUSED_CALLS, **WRITING_CALLS, **CHECKED_CALLS, **UNKNOWN_CALLS}[name][column]
        if number is not None:
            program.extend([(EQUAL, 0, len(then), number), *then])

    def check(name: str, argument: int, test: int, values: list[int], allow: bool) -> None:
        """Allows or refuses a call if an argument matches one of the values; else the opposite."""
        tests = [(test, len(values) - n, 0, value) for n, value in enumerate(values)]
        met, unmet = (ALLOW, DENY) if allow else (DENY, ALLOW)
        load = (LOAD, 0, 0, 16 + 8 * argument)
        add(name, load, *tests, (RETURN, 0, 0, unmet), (RETURN, 0, 0, met))

    for name in REFUSED_CALLS if may_write else {**REFUSED_CALLS, **WRITING_CALLS}:
        add(name, (RETURN, 0, 0, DENY))
    for name in UNKNOWN_CALLS:  # glibc then falls back to clone, whose flags can be checked
        add(name, (RETURN, 0, 0, NOT_THERE))
    check("clone", 0, ANY_BIT, [0x10000] if may_thread else [], allow=True)  # CLONE_THREAD
    check("kill", 0, EQUAL, [itself], allow=True)
    check("tgkill", 0, EQUAL, [itself], allow=True)
    check("prlimit64", 0, EQUAL, [0], allow=True)  # of itself
    check("socketpair", 1, ANY_BIT, [0xE], allow=False)  # all types but SOCK_STREAM
    check("fcntl", 1, EQUAL, [8, 15], allow=False)  # F_SETOWN(_EX): signals through a file
    # FIOSETOWN, SIOCSPGRP, TIOCSTI; FS_IOC_SETFLAGS, FS_IOC32_SETFLAGS, FS_IOC_FSSETXATTR
    owners, attributes = [0x8901, 0x8902, 0x5412], [0x40086602, 0x40046602, 0x401C5820]
    check("ioctl", 1, EQUAL, owners + attributes, allow=False)
    if not may_write:
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        check("open", 1, ANY_BIT, [writes], allow=False)
        check("openat", 2, ANY_BIT, [writes], allow=False)
    program.append((RETURN, 0, 0, ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    pointer = struct.pack("@HP", len(program), ctypes.addressof(code))
    call_libc("prctl", 22, 2, pointer, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
