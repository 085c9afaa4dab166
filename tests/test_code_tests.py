"""All forms of tests, tests that check nothing, and the way a program is run."""

from __future__ import annotations

import ast
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from grpo.rewards import Code
from grpo.rewards.code_tests import read_tests
from tests.test_reward_code import ADD, ADD_TESTS, build_raw_sample, build_sample

CHECKS_NOTHING = {
    "a text": "'''Adds two numbers.'''",
    "a number": "42",
    "a name": "add",
    "nothing but imports": "import math",
    "a comparison that nobody looks at": "add(1, 2) == 3\nadd(0, 0) == 0",
    "a list of them": ["add(1, 2) == 3", "(add(1, 2), 3)"],
    "what is printed": "print(add(1, 2) == 3)",
    "a call whose result is thrown away": "add(1, 2)",
    "the same in a loop": "for n in range(3):\n    add(n, n)",
    "an assignment": "right = add(1, 2) == 3",
    "pass": "pass",
    "a function for later": "lambda: add(1, 2)",
    "a true tuple": "assert (add(1, 2) == 3, 'should be 3')",
    "a true alternative": "assert add(1, 2) == 3 or 'no 3'",
    "a true generator": "assert (add(n, 0) == n for n in range(9))",
    "a true constant": "assert True",
    "something of its own": "three = 3\nassert three == 3",
    "a function that is not called": "def check(add):\n    assert add(1, 2) == 3",
    "an error that is passed over": "try:\n    assert add(1, 2) == 3\nexcept Exception: pass",
    "a report": "import unittest\nunittest.main(exit=False)",
    "a guard": "if __name__ == '__main__':\n    assert add(1, 2) == 3",
    "no output": [{"input": "1 2", "output": " \n"}],
    "a JSON number": '"42"',
}


def test_tests_that_check_nothing_are_a_failure_for_any_program() -> None:
    """Any program would pass each of them, even the empty one or a wrong one."""
    samples = [
        build_sample(program, tests)
        for tests in CHECKS_NOTHING.values()
        for program in (ADD, "def add(a, b):\n    return 'x'")
    ]
    values = [str(value) for value in Code(workers=2)(samples)]
    wrong = {name: values[2 * n : 2 * n + 2] for n, name in enumerate(CHECKS_NOTHING)}
    assert {
        name: pair for name, pair in wrong.items() if not all("nothing" in value for value in pair)
    } == {}


SUM = "a, b = map(int, input().split())\nprint(a + b)"
SOLUTION = "class Solution:\n    def add(self, a, b):\n        return a + b"
PAIRS = [{"input": "1 2\n", "output": "3\n"}, {"input": "4 5", "output": "9"}]
COLUMNS = {"inputs": ["1 2", "4 5"], "outputs": ["3", "9"]}
CALLS = {"fn_name": "add", "inputs": [[1, 2], [4, 5]], "outputs": [3, [9]]}
FORMS = {
    "a list": (SUM, PAIRS),
    "a list in JSON": (SUM, json.dumps(PAIRS)),
    "a list as Python writes it": (SUM, repr(PAIRS)),
    "a list in JSON in JSON": (SUM, json.dumps(json.dumps(PAIRS))),
    "a list of JSON": (SUM, [json.dumps(pair) for pair in PAIRS]),
    "an object": (SUM, COLUMNS),
    "an object in JSON": (SUM, "\n" + json.dumps(COLUMNS, indent=1)),
    "an object of parquet": (SUM, {"input": ["1 2", "4 5"], "output": ["3", "9"]}),
    "one pair": (SUM, PAIRS[0]),
    "whole numbers": (SUM, {"inputs": ["1 2"], "outputs": [3]}),
    "lines": ("print(int(input()) + int(input()))", {"inputs": [["1", "2"]], "outputs": [["3"]]}),
    "no function": (SUM, COLUMNS | {"fn_name": None}),
    "a function": (ADD, CALLS),
    "a function in JSON": (ADD, json.dumps(CALLS)),
    "a method": (SOLUTION, CALLS),
    "arguments in lines": (ADD, {"fn_name": "add", "inputs": ["[1]\n[2]"], "outputs": ["[1, 2]"]}),
    "a tuple for a list": ("def add(a, b): return a, b", CALLS | {"outputs": [[1, 2], [4, 5]]}),
    "asserts in JSON": (ADD, json.dumps(ADD_TESTS.splitlines())),
    "test functions": (
        ADD,
        "from solution import add as plus\n"
        "def test_small():\n    assert plus(1, 2) == 3\n"
        "def test_zero():\n    assert add(0, 0) == 0",
    ),
    "a test case": (
        ADD,
        "import unittest\nclass Tests(unittest.TestCase):\n"
        "    @classmethod\n    def setUpClass(cls):\n        cls.three = 3\n"
        "    def test_small(self):\n        self.assertEqual(add(1, 2), self.three)\n"
        "if __name__ == '__main__':\n    unittest.main()",
    ),
    "a test case that would leave": (
        ADD,
        "from unittest import TestCase\nimport unittest\nclass Tests(TestCase):\n"
        "    def test_small(self):\n        self.assertEqual(add(1, 2), 3)\nunittest.main()",
    ),
}


def test_tests_in_every_form_that_data_sets_have() -> None:
    """The right program passes; an empty, a wrong and a missing one don't."""
    reward = Code(workers=2)
    wrong = "print(4)\ndef add(a, b):\n    return 4\nclass Solution:\n    add = lambda *_: 4"
    for program, value in ((None, 1.0), (wrong, 0.0), ("", 0.0)):
        values = reward(
            [build_sample(right if program is None else program, t) for right, t in FORMS.values()]
        )
        assert dict(zip(FORMS, values, strict=True)) == dict.fromkeys(FORMS, value)
    assert reward([build_raw_sample("I don't know.", tests) for _, tests in FORMS.values()]) == [
        0.0
    ] * len(FORMS)


AS_A_SCRIPT = {  # each prints what `python answer.py` prints
    "exit()": "print('ok')\nexit()",
    "quit(0)": "print('ok')\nquit(0)",
    "sys.exit(None)": "import sys\nprint('ok')\nsys.exit(None)",
    "os._exit(0)": "import os\nprint('ok', flush=True)\nos._exit(0)",
    "at the exit": "import atexit\natexit.register(print, 'ok')\nexit()",
    "the interactive names": "copyright, credits, license, help\nprint('ok')",
    "the end of its input": "try:\n    input()\nexcept EOFError:\n    print('ok')",
    "all of its input": "import sys\nprint(sys.stdin.read() + open(0).read() + 'ok')",
    "its name": "import __main__\nprint(__main__.f(), __name__ == '__main__')\n",
    "its file": "import os\nprint(os.path.relpath(__file__), os.path.isabs(__file__))",
    "its arguments": "import sys\nprint(sys.argv[1:], len(sys.argv))",
    "its flags": "def f(x: int): pass\nprint(f.__annotations__['x'] is int)",
    "its own flags": "from __future__ import annotations\ndef f(x: y): pass\nprint('ok')",
    "UTF-8": "print('é €')",
    "another encoding": "# -*- coding: latin-1 -*-\nprint('é €')",
    "a mark of UTF-8": "\ufeffprint('ok')",
    "Windows' lines": "if True:\r\n    print('ok')\r\n",
}
PRINTED = {
    "its name": "1 True", "its file": "answer.py True", "its arguments": "[] 1",
    "its flags": "True", "UTF-8": "é €", "another encoding": "é €",
}  # fmt: skip


def test_a_program_runs_as_a_script_would() -> None:
    programs = AS_A_SCRIPT | {"its name": "def f(): return 1\n" + AS_A_SCRIPT["its name"]}
    samples = [
        build_sample(program, [{"input": "", "output": PRINTED.get(name, "ok")}])
        for name, program in programs.items()
    ]
    values = Code(workers=2)(samples)
    assert dict(zip(programs, values, strict=True)) == dict.fromkeys(programs, 1.0)


@pytest.mark.parametrize("end", ["exit(1)", "exit('no')", "quit(2)", "raise SystemExit('no')"])
def test_a_program_that_says_it_failed_did(end: str) -> None:
    assert Code()([build_sample(f"print('ok')\n{end}", [{"input": "", "output": "ok"}])]) == [0.0]


def test_asserts_and_their_program_have_their_own_compiler_flags() -> None:
    program = "def f(x: int): pass"
    assert Code()([build_sample(program, "assert f.__annotations__ == {'x': int}")]) == [1.0]
    assert Code()([build_sample(program, "def g(x: y): pass\nassert g(1) is f(1)")]) == [0.0]


def test_one_thread_at_a_time_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once can make CPython 3.11's parser raise SystemError, about once in 200 times."""
    inside, most = 0, 0
    parse = ast.parse

    def count_threads(*arguments: Any, **options: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.001)
        tree = parse(*arguments, **options)
        inside -= 1
        return tree

    monkeypatch.setattr(ast, "parse", count_threads)
    columns = ["assert f() == 1", {"input": "(1, 2)", "output": "('a',)"}] * 20
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read_tests, columns))
    assert most == 1
