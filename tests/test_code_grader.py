"""What tests in Python can do with a program in another process, and what it can't do."""

from __future__ import annotations

import re
from pathlib import Path

from grpo.rewards import Code
from tests.test_reward_code import build_sample, hurry, reward

PROGRAMS = Path(__file__).parent / "programs"
PARTS = r"^## ([^\n]+)\n```python\n(.*?)\n```\n```python\n(.*?)\n```$"  # title, program, tests
CASE = re.compile(PARTS, re.DOTALL | re.MULTILINE)


__all__ = ["reward"]  # the fixture: every kind of kernel


def read_cases(name: str) -> dict[str, tuple[str, str]]:
    return {
        title: (program, tests)
        for title, program, tests in CASE.findall((PROGRAMS / name).read_text())
    }


HONEST = read_cases("honest.md")


def test_tests_use_the_program_as_if_it_were_in_their_process(reward: Code) -> None:
    values = reward([build_sample(*case) for case in HONEST.values()])
    assert dict(zip(HONEST, values, strict=True)) == dict.fromkeys(HONEST, 1.0)


HOSTILE = read_cases("hostile.md")


def test_no_program_passes_a_test_by_prying_forging_or_lying(reward: Code) -> None:
    share = Code(strict=False, seconds=1.0, workers=4)  # so that a single passed test shows
    share.limits = share.limits._replace(landlock=reward.limits.landlock)
    values = share([build_sample(*case) for case in HOSTILE.values()])
    share.close()
    assert dict(zip(HOSTILE, values, strict=True)) == dict.fromkeys(HOSTILE, 0.0)


def test_a_search_of_memory_finds_what_is_there_and_nothing_else_is(reward: Code) -> None:
    search, tests = HOSTILE["looks for what is expected in its own memory, by its addresses"]
    assert reward([build_sample(search, tests)]) == [0.0]
    assert reward([build_sample(f"{search}\n# f() == 918273645", tests)]) == [1.0]


UNSUPPORTED = {
    "a class derived from one of the program's": (
        "class A:\n    x = 1",
        "class B(A):\n    y = 2\nassert B().y == 2",
    ),
    "its source": (
        "def f():\n    return 1",
        "import inspect\nassert 'return' in inspect.getsource(f)",
    ),
    "an object of its own beside a value": (
        "class Money:\n    def __init__(self, n):\n        self.n = n\n"
        "    def __eq__(self, other):\n        return self.n == getattr(other, 'n', other)",
        "assert Money(5) == 5",
    ),
    "a number from arithmetic with both": (
        "class Money:\n    def __sub__(self, other):\n        return 5 - other",
        "assert Money() - 2 == 3",
    ),
    "globals of the tests": ("def f():\n    return x", "x = 3\nassert f() == 3"),
    "an await of the tests' coroutine": (
        "async def f(c):\n    return await c",
        "import asyncio\nasync def g():\n    return 1\nassert asyncio.run(f(g())) == 1",
    ),
    "a text that is not in the tests": (
        "def f():\n    return '1 + 1'",
        "assert eval(f()) == 2",
    ),
}


def test_what_tests_can_no_longer_do_fails(reward: Code) -> None:
    """A right program scores 0 at the limits that `Code` lists."""
    values = reward([build_sample(*case) for case in UNSUPPORTED.values()])
    assert dict(zip(UNSUPPORTED, values, strict=True)) == dict.fromkeys(UNSUPPORTED, 0.0)


def test_a_builtin_is_the_programs_where_tests_use_no_other_name(reward: Code) -> None:
    zero = "def abs(x):\n    return 0.0\ndef f(x):\n    return x"
    assert reward([build_sample(zero, "assert abs(f(2) - 0.5) < 1e-6")]) == [0.0]
    assert reward([build_sample(zero, "assert abs(-3) == 0.0")]) == [1.0]
    assert reward([build_sample(zero, "abs = lambda x: 7\nassert abs(f(2)) == 7")]) == [1.0]


def test_a_program_and_its_tests_have_a_folder_each(reward: Code) -> None:
    program = (
        "import os\ndef f():\n    return os.getcwd()\n"
        "def g(path):\n    try:\n        os.listdir(path)\n    except PermissionError:\n"
        "        return 'closed'"
    )
    tests = "import os\nhere = os.getcwd()\nassert f() != here"
    assert reward([build_sample(program, tests)]) == [1.0]
    if reward.limits.landlock:
        assert reward([build_sample(program, tests + "\nassert g(here) == 'closed'")]) == [1.0]


def test_the_seconds_of_a_run_hold_over_program_and_tests_together(reward: Code) -> None:
    program = "import time\ntime.sleep(0.4)\ndef f():\n    time.sleep(0.4)\n    return 1"
    once = "assert f() == 1"
    assert hurry(reward)([build_sample(program, once)]) == [1.0]
    assert hurry(reward)([build_sample(program, f"{once}\n{once}")]) == [0.0]
    assert hurry(reward)([build_sample(program, f"import time\ntime.sleep(0.4)\n{once}")]) == [0.0]
