"""Programs that pass, fail and attack, on every kind of kernel that this one can imitate."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo.errors import ConfigError
from grpo.rewards import Code
from grpo.types import Example, Failure, Sample
from grpo.verifiers.confine import detect_landlock_version

KERNELS = [
    version for version in (detect_landlock_version(), 1, 0) if version <= detect_landlock_version()
]
ADD = "def add(a, b):\n    return a + b"
ADD_TESTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0"
CALL = "assert f() == 1"  # the test that every hostile program would have to pass


def build_sample(program: str, tests: Any, column: str = "tests") -> Sample:
    return build_raw_sample(f"Here it is:\n```python\n{program}\n```\nDone.", tests, column)


def build_raw_sample(completion: str, tests: Any, column: str = "tests") -> Sample:
    columns = {} if tests is None else {column: tests}
    return Sample("q", completion, (1,), False, Example("q", "", float, columns), 0)


def list_kernels() -> list[Any]:
    """Returns the versions of Landlock to test; those between the ends are marked slow."""
    versions = list(dict.fromkeys(KERNELS))
    ends = (versions[0], versions[-1])
    return [pytest.param(v, marks=[pytest.mark.slow] * (v not in ends)) for v in versions]


@pytest.fixture(scope="module", params=list_kernels(), ids=lambda v: f"landlock{v}")
def reward(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Code]:
    """Builds the reward for a version of Landlock: 1 can't restrict writes, 0 is no Landlock."""
    folders = tmp_path_factory.mktemp("folders")
    usual, tempfile.tempdir = tempfile.tempdir, str(folders)
    reward = Code(seconds=10.0, workers=4)
    reward.limits = reward.limits._replace(landlock=request.param)
    yield reward
    reward.close()
    assert list_sandboxes() == []
    assert list(folders.iterdir()) == []
    tempfile.tempdir = usual


def list_sandboxes(parent: int | None = None) -> list[str]:
    """Returns the sandboxes of a process that still run."""
    lines = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                lines.append((entry / "cmdline").read_text())
            except OSError:
                continue
    return [line for line in lines if f'{{"parent": {parent or os.getpid()},' in line]


GOOD = {
    "a string of asserts": (ADD, ADD_TESTS),
    "a list": (ADD, ["assert add(1, 2) == 3", "x = 4\nassert add(x, x) == 8"]),
    "set-up before the asserts": (ADD, "import math\nx = math.inf\nassert add(x, 1) == x"),
    "a check function": (ADD, "def check(f):\n    assert f(2, 2) == 4\n\ncheck(add)"),
    "stdin and stdout": (
        "a, b = map(int, input().split())\nprint(a + b)",
        [{"input": "1 2\n", "output": "3\n"}, {"input": "4 5", "output": "9"}],
    ),
    "white space at line ends": ("print('1 ')\nprint('2\\n')", [{"input": "", "output": "1\n2"}]),
    "a main guard": (
        "if __name__ == '__main__':\n    print('hi')",
        [{"input": "", "output": "hi"}],
    ),
    "a big stack in a thread": (
        "import sys, threading\nthreading.stack_size(2**26)\nsys.setrecursionlimit(10**6)\n"
        "thread = threading.Thread(target=lambda: print(input()))\nthread.start()",
        [{"input": "ok", "output": "ok"}],
    ),
    "a pool of threads": (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "def f():\n    with ThreadPoolExecutor() as pool:\n"
        "        return sum(pool.map(abs, [-1] * 9))",
        "assert f() == 9",
    ),
    "asyncio": (
        "import asyncio\nasync def g():\n    return 1\ndef f():\n    return asyncio.run(g())",
        CALL,
    ),
    "the standard library": (
        "import collections, csv, datetime, decimal, fractions, heapq, itertools, json, random\n"
        "import re, sqlite3, ssl, statistics, unittest, zoneinfo\n"
        "def f():\n    return 1 + datetime.datetime.now(zoneinfo.ZoneInfo('UTC')).utcoffset().days",
        CALL,
    ),
    "annotated dataclasses": (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass P:\n    x: int",
        "assert P(1).x == 1",
    ),
    "chatter": ("print('x' * 5_000_000)\n" + ADD, ADD_TESTS),
}


def hurry(reward: Code) -> Code:
    """Returns the same reward with one second a run."""
    hurried = Code(seconds=1.0, workers=4)
    hurried.limits = hurried.limits._replace(landlock=reward.limits.landlock)
    return hurried


def test_programs_that_do_what_they_should_pass(reward: Code) -> None:
    values = reward([build_sample(*case) for case in GOOD.values()])
    assert dict(zip(GOOD, values, strict=True)) == dict.fromkeys(GOOD, 1.0)


FAILING = {
    "one wrong of two": ("def add(a, b):\n    return 3", ADD_TESTS),
    "no syntax": ("def add(a, b) return a", ADD_TESTS),
    "nothing defined": ("", ADD_TESTS),
    "a main guard is not run for asserts": ("if __name__ == '__main__':\n    f = int", CALL),
    "prints something else": ("print(4)", [{"input": "", "output": "3"}]),
    "prints more": ("print(3)\nprint(3)", [{"input": "", "output": "3"}]),
    "prints it, then crashes": ("print(3)\n1 / 0", [{"input": "", "output": "3"}]),
    "prints 1 GB": (
        "for _ in range(1024):\n    print('x' * 2**20)",
        [{"input": "", "output": "x"}],
    ),
    "a crash": ("import ctypes\nctypes.string_at(0)", CALL),
    "an abort": ("import os\nos.abort()", CALL),
    "endless recursion": ("def f():\n    return f()", CALL),
    "a loop": ("while True: pass", CALL),
    "a loop that catches everything": (
        "while True:\n    try:\n        raise SystemExit\n    except BaseException: pass",
        CALL,
    ),
    "a sleep": ("import time\ntime.sleep(100)", CALL),
    "a sleep in a thread": (
        "import threading, time\nprint(1, flush=True)\n"
        "threading.Thread(target=time.sleep, args=(100,)).start()",
        [{"input": "", "output": "1"}],
    ),
    "10 GB": ("x = bytearray(10 * 2**30)\nf = lambda: 1", CALL),
    "10 GB, bit by bit": ("x = []\nwhile True: x.append(bytearray(2**20))", CALL),
    "10 GB of files in memory": (
        "import os\nwhile True: os.write(os.memfd_create('x'), bytes(2**20))",
        CALL,
    ),
    "leaves early": ("import sys\nsys.exit(0)", CALL),
    "leaves at once": ("import os\nprint('passed')\nos._exit(0)", CALL),
    "leaves in the test": ("import os\ndef f():\n    os._exit(0)", CALL),
    "leaves in the test with an exception": ("def f():\n    raise SystemExit(0)", CALL),
    "leaves at the end": ("import atexit, os\natexit.register(os._exit, 0)\nf = lambda: 2", CALL),
}


def test_programs_that_fail_crash_hang_or_leave_score_zero(reward: Code) -> None:
    start = time.monotonic()
    values = hurry(reward)([build_sample(*case) for case in FAILING.values()])
    assert dict(zip(FAILING, values, strict=True)) == dict.fromkeys(FAILING, 0.0)
    assert time.monotonic() - start < 15


# Each does what must be impossible, then defines the f that its test calls.
FORBIDDEN = {
    "fork": "os.fork()",
    "spawn": "subprocess.run(['/bin/true'])",
    "exec": "os.execv('/bin/true', ['true'])",
    "fork by number": "assert libc.syscall(56, 17, 0, 0, 0, 0) >= 0",
    "fork by the other numbers": "assert libc.syscall(0x40000000 + 57) >= 0",
    "clone3": "assert libc.syscall(435, 0, 0) < 0 and ctypes.get_errno() != 38",
    "a socket": "socket.socket()",
    "a datagram pair": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "io_uring": "assert libc.syscall(425, 1, bytes(200)) >= 0",
    "kill the parent": "os.kill(os.getppid(), 9)",
    "kill by way of a file": "fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
    "the parent's limits": "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (1, 1))",
    "the parent's priority": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "the parent's memory": "open(f'/proc/{os.getppid()}/mem', 'rb')",
    "to outlive the parent": "assert libc.prctl(1, 0) == 0",
    "shared memory": "assert libc.shmget(0, 4096, 0o1600) >= 0",
    "be root again": "os.setuid(0) or os.chown('.', 0, 0)",
    "write outside": "open(VICTIM + 'new', 'w')",
    "write over": "open(VICTIM, 'r+').write('y')",
    "write beside": "open('../grpo-code-beside', 'w')",
    "remove": "os.unlink(VICTIM)",
    "truncate": "os.truncate(VICTIM, 0)",
    "truncate by opening": "os.open(VICTIM, os.O_RDONLY | os.O_TRUNC)",
    "chmod": "os.chmod(VICTIM, 0o777)",
    "touch": "os.utime(VICTIM)",
    "a folder": "os.mkdir('folder')",
    "a link out": "os.symlink(VICTIM, 'link') or open('link')",
    "a hard link out": "os.link(VICTIM, 'link')",
    "chroot": "os.chroot('.')",
    "a terminal": "open('/dev/tty', 'w')",
}
HIDDEN = {
    "passwords": "open('/etc/passwd')",
    "this repository": f"open({__file__!r})",
    "what there is": "os.listdir('/')",
    "who started it": "open(f'/proc/{os.getppid()}/cmdline')",
}
IMPORTS = (
    "import ctypes, fcntl, os, resource, socket, subprocess\n"
    "libc = ctypes.CDLL(None, use_errno=True)\n"
)


def test_nothing_leads_out_of_the_process(reward: Code, tmp_path: Path) -> None:
    victim = tmp_path / "victim"  # that any user may write to
    victim.write_text("x")
    victim.chmod(0o666)
    tmp_path.chmod(0o777)
    before = victim.stat()
    program = IMPORTS + f"VICTIM = {str(victim)!r}\n"
    forbidden = FORBIDDEN | (HIDDEN if reward.limits.landlock else {})
    values = reward(
        [build_sample(f"{program}{deed}\nf = lambda: 1", CALL) for deed in forbidden.values()]
    )
    assert dict(zip(forbidden, values, strict=True)) == dict.fromkeys(forbidden, 0.0)
    assert list(tmp_path.iterdir()) == [victim]
    assert victim.stat() == before
    assert reward([build_sample(program + "f = lambda: 1", CALL)]) == [1.0]


def test_a_program_writes_in_its_own_folder_where_landlock_can_hold_it_there(reward: Code) -> None:
    program = "def f():\n    open('x', 'w').write('1')\n    return int(open('x').read())"
    assert reward([build_sample(program, CALL)]) == [float(reward.limits.landlock >= 3)]


@pytest.mark.parametrize("size", [2**20, 0])
def test_a_program_that_fills_the_disk_is_stopped_early(reward: Code, size: int) -> None:
    fill = f"for n in range(10**9): open(str(n), 'wb').write(bytes({size}))"
    start = time.monotonic()
    assert reward([build_sample(fill, CALL)]) == [0.0]
    assert time.monotonic() - start < 5  # half of its time limit


BOMBS = {
    "forks": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "threads": """
import threading, time
threading.stack_size(32768)
try:
    for number in range(10**6):
        threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
except RuntimeError:
    f = lambda: int(number < 64)
""",
}


def test_a_bomb_is_one_process_of_few_threads_and_gone_afterwards(reward: Code) -> None:
    forks, threads = (build_sample(program, CALL) for program in BOMBS.values())
    assert hurry(reward)([forks]) == [0.0]
    assert reward([threads]) == [1.0]
    assert list_sandboxes() == []


# What a program can find: frames, their constants, all objects, its files.
PRY = """
import gc, hashlib, os, sys
def f():
    found, frame = set(), sys._getframe()
    while frame:
        for value in [*frame.f_locals.values(), *frame.f_globals.values(), *frame.f_code.co_consts]:
            found.add(value if isinstance(value, bytes) else str(value).encode(errors="replace"))
        frame = frame.f_back
    for thing in gc.get_objects():
        found.update(value for value in gc.get_referents(thing) if isinstance(value, bytes))
    for path in (*sys.argv, "/proc/self/cmdline", "/proc/self/environ", "test.py", "answer.py"):
        try:
            found.add(open(path, "rb").read())
        except OSError:
            pass
    for descriptor in range(3, 64):
        for value in found:
            try:
                os.pwrite(descriptor, hashlib.sha256(value).digest(), 0)
            except OSError:
                break
    print("passed")
    os._exit(0)
"""
COPY = """
import os
def f():
    for source in range(3, 64):
        try:
            tokens = os.read(source, 2**20)
        except OSError:
            continue
        for target in range(3, 64):
            try:
                os.pwrite(target, tokens, 0)
            except OSError:
                pass
    os._exit(0)
"""


def test_prying_into_frames_objects_files_and_descriptors_does_not_pass(reward: Code) -> None:
    assert hurry(reward)([build_sample(PRY, CALL), build_sample(COPY, CALL)]) == [0.0, 0.0]


ORPHAN = """
from grpo.rewards.code import Code
from grpo.types import Example, Sample
example = Example("q", "", float, {"tests": "assert f()"})
program = "```python\\nimport time\\ntime.sleep(600)\\n```"
Code(seconds=600)([Sample("q", program, (1,), False, example, 0)])
"""


def test_no_program_outlives_the_process_that_started_it(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", ORPHAN], env=environment) as process:
        wait_until(lambda: len(list_sandboxes(process.pid)) == 2, seconds=30)
        process.send_signal(signal.SIGKILL)
        wait_until(lambda: list_sandboxes(process.pid) == [], seconds=5)


def wait_until(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


HALF = "def add(a, b):\n    return 3"  # right only for 1 + 2


@pytest.mark.parametrize(
    ("program", "tests", "share"),
    [
        (HALF, ADD_TESTS, 0.5),
        (HALF, ["assert add(1, 2) == 3", "assert add(0, 3) == 3", "assert add(1, 1) == 2"], 2 / 3),
        (HALF, f"'''The tests.'''\nimport math\nx = 0\n{ADD_TESTS}", 0.5),  # only asserts count
        (
            HALF + "\ndef g():\n    while True: pass",
            f"{ADD_TESTS}\ng()\nassert add(1, 2) == 3",
            0.25,
        ),
        ("print(input())", [{"input": str(n), "output": "1"} for n in (0, 1, 2, 1)], 0.5),
    ],
)
def test_the_share_of_tests_passed_or_all_of_them(program: str, tests: Any, share: float) -> None:
    seconds = 2.0 if "while True" in program else 10.0
    assert Code(strict=False, seconds=seconds)([build_sample(program, tests)]) == [share]
    assert Code(strict=True, seconds=seconds)([build_sample(program, tests)]) == [0.0]


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        (f"```python\n{HALF}\n```\nNo:\n```py\n{ADD}\n```", 1.0),  # the last fence
        (f"```python\n{ADD}\n```\nOutput:\n```\n3\n```", 1.0),  # the last Python fence
        (f"```\n{ADD}\n```", 1.0),
        (f"  ```python\n  {ADD}\n  ```".replace("\n    ", "\n      "), 1.0),  # indented
        (f"```python\n{HALF}\n```\n<answer>\n```python\n{ADD}\n```\n</answer>", 1.0),
        (f"<answer>{ADD}</answer>", 1.0),
        (f"```python\n{ADD}\n```\n<answer>42</answer>", 0.0),  # the answer tag counts
        (f"```python\n{ADD}", 0.0),  # truncated
        (ADD, 0.0),  # no fence
        ("", 0.0),
        ("```python\n\ud800\x00\n```", 0.0),
    ],
)
def test_the_program_is_the_last_fence_of_the_answer(completion: str, value: float) -> None:
    assert Code()([build_raw_sample(completion, ADD_TESTS)]) == [value]


@pytest.mark.parametrize(
    "tests", [None, "", " \n", [], "[]", {}, float("nan"), {"inputs": [], "outputs": []}]
)
def test_a_row_without_tests_is_not_for_this_reward(tests: Any) -> None:
    assert Code()([build_sample(ADD, tests)]) == [None]


@pytest.mark.parametrize(
    "tests",
    [
        *("assert add(1,", [{"input": "1"}], [1, 2], {"input": "1"}, 5, b"assert add(1, 2) == 3"),
        *([{"input": "1", "output": 0.1}], [{"input": "1", "output": "1"}, "assert add(1, 2)"]),
        '{"inputs": ["1", "2"], "outputs": ["3"]}',
        '{"inputs": "1", "outputs": "3"}',
        '[{"input": "1", "output": NaN}]',
        [{"input": "[1, 2]", "output": "3", "testtype": "functional"}],  # of which function?
        {"fn_name": "add()", "inputs": [[1, 2]], "outputs": [3]},
        {"fn_name": "add", "inputs": [1], "outputs": [3]},
        [{"input": "1", "output": "x" * (2**20 + 1)}],  # more than file_mb lets it print
        "assert add(" + "1+" * 5000 + "1, 2) == 3",  # too deep for Python's own unparser
    ],
    ids=lambda tests: str(tests)[:40],
)
def test_tests_that_cannot_be_read_are_a_failure(tests: Any) -> None:
    (value,) = Code(column="checks")([build_sample(ADD, tests, column="checks")])
    assert isinstance(value, Failure)
    assert value.reason.startswith("column checks: ")


@pytest.mark.parametrize("interpreter", ["/bin/false", "/bin/nothing"])
def test_where_the_sandbox_cannot_start_it_is_a_failure_not_a_zero(
    monkeypatch: pytest.MonkeyPatch, interpreter: str
) -> None:
    monkeypatch.setattr("grpo.verifiers.start_sandbox.INTERPRETER", (interpreter,))
    (value,) = Code()([build_sample(ADD, ADD_TESTS)])
    assert isinstance(value, Failure)
    assert "could not be run" in value.reason


@pytest.mark.parametrize("option", ["seconds", "memory_mb", "file_mb", "workers"])
def test_a_bad_option_is_named_with_its_value(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option}=0"):
        Code(**{option: 0})
