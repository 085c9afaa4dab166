"""A reward for programs that pass their tests."""

from __future__ import annotations

import ast
import logging
import re
import secrets
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

from grpo.data.verify import tagged_answer
from grpo.errors import ConfigError
from grpo.rewards.options import at_least, more_than_nothing
from grpo.types import Failure, Sample
from grpo.verifiers.launch import CannotRun, launch
from grpo.verifiers.sandbox import TOKEN, Limits, landlock_version

log = logging.getLogger(__name__)

FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
PYTHON = ("python", "python3", "py")
SETUP = (
    *(ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef),
    *(ast.Assign, ast.AnnAssign, ast.AugAssign),
)


class Code:
    """The share of its tests that a Python program passes.

    The program is the last ```python fence of the last `<answer>…</answer>`, or all that is in
    there; without the tags, the last fence of the completion. Its tests are in a column of the row:

    - a string of Python: each statement that is no import, definition or assignment is a test;
    - a list of such strings, each one test;
    - a list of `{input, output}`: the program reads the one and has to print the other, but for
      white space at the ends of lines. Each is run on its own.

    The reward does not apply to a row without tests. A program that fails, crashes, hangs or takes
    more than it may scores 0; a failure is only where it could not be run, or its tests can't be
    read. `grpo.verifiers.sandbox` says what a running program can and can't do.

    A test counts as passed when it ran to its end and a random token, which the program's process
    is given only then, comes back hashed: leaving early or printing anything does not do. Tests and
    program share a process, so one that knows `sandbox.py`, or gives objects that equal everything,
    can still fake it; `{input, output}` tests are compared outside and can't be faked.

    Args:
        column: of the row, where the tests are.
        strict: all tests passed or nothing.
        seconds: of one run, on the clock and of CPU.
        memory_mb: address space of one run.
        file_mb: all that one run may leave in its folder, and print where that is compared.
        workers: runs at a time.
    """

    concurrent = True

    def __init__(
        self,
        column: str = "tests",
        strict: bool = True,
        seconds: float = 5.0,
        memory_mb: int = 512,
        file_mb: int = 1,
        workers: int = 2,
    ) -> None:
        at_least(1, memory_mb=memory_mb, file_mb=file_mb, workers=workers)
        more_than_nothing(seconds=seconds)
        self.column = column
        self.strict = strict
        self.workers = workers
        try:
            self.limits = Limits(seconds, memory_mb, file_mb, landlock_version())
        except OSError as error:
            raise ConfigError(f"grpo.rewards.Code can't confine programs here: {error}.") from error
        self.threads: ThreadPoolExecutor | None = None
        self.warned = False

    def __call__(self, samples: Sequence[Sample]) -> list[float | Failure | None]:
        if not self.warned and not any(self.column in s.example.columns for s in samples):
            log.warning("column=%s: no row of this batch has one, so no tests", self.column)
            self.warned = True
        if self.threads is None:
            self.threads = ThreadPoolExecutor(self.workers, thread_name_prefix="code")
        return list(self.threads.map(self.score, samples))

    def close(self) -> None:
        if self.threads is not None:
            self.threads.shutdown(cancel_futures=True)
            self.threads = None

    def score(self, sample: Sample) -> float | Failure | None:
        tests = sample.example.columns.get(self.column)
        if tests is None or tests == "" or tests == []:
            return None
        try:
            passed = self.passed(last_program(sample.completion).encode(errors="replace"), tests)
        except CannotRun as error:
            return Failure(f"the program could not be run: {error}")
        except NotTests as error:
            return Failure(f"column {self.column}: {error}")
        if not passed:
            return None
        return float(all(passed)) if self.strict else sum(passed) / len(passed)

    def passed(self, program: bytes, tests: Any) -> list[bool]:
        """Whether each test passed; in strict mode the list may end at the first that didn't."""
        if not isinstance(tests, str | list):
            raise NotTests(f"is a {type(tests).__name__}, should be a string or a list")
        if isinstance(tests, str) or all(isinstance(test, str) for test in tests):
            return self.run_asserts(program, statements(tests))
        passed = []
        for given, wanted in pairs(tests):
            run = launch([program], self.limits, given)
            passed.append(run.exit_code == 0 and lines(run.printed) == lines(wanted))
            if self.strict and not passed[-1]:
                break
        return passed

    def run_asserts(self, program: bytes, tests: Sequence[ast.Module]) -> list[bool]:
        tokens = [secrets.token_bytes(TOKEN) for _ in tests]
        exam = [program]
        for test, token in zip(tests, tokens, strict=True):
            exam += [ast.unparse(test).encode(), token]
        results = launch(exam, self.limits, given=None).results
        return [
            results[32 * n : 32 * n + 32] == sha256(tokens[n]).digest()
            for n, test in enumerate(tests)
            if any(map(checks, test.body))
        ]


def last_program(completion: str) -> str:
    """The program that a completion gives, empty where it gives none."""
    answer = tagged_answer(completion)
    fences = FENCE.findall(completion if answer is None else answer)
    if fences:
        python = [code for language, code in fences if language.lower() in PYTHON]
        return textwrap.dedent(python[-1] if python else fences[-1][1])
    return answer or ""


def checks(statement: ast.stmt) -> bool:
    """Whether a statement of a test may check something; a docstring doesn't."""
    is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return not is_text and not isinstance(statement, SETUP)


class NotTests(Exception):
    """A column holds something else than the tests that `Code` describes."""


def statements(tests: str | Sequence[str]) -> list[ast.Module]:
    """Tests as Python: each statement of a string, or each string of a list."""
    try:
        if isinstance(tests, str):
            return [ast.Module([statement], []) for statement in ast.parse(tests).body]
        return [module for module in map(ast.parse, tests) if module.body]
    except (SyntaxError, ValueError, RecursionError) as error:
        raise NotTests(f"no Python ({type(error).__name__}: {error})") from error


def pairs(tests: Sequence[Any]) -> list[tuple[bytes, bytes]]:
    """What a program is given and has to print, of each test."""
    try:
        return [(test["input"].encode(), test["output"].encode()) for test in tests]
    except (TypeError, KeyError, AttributeError) as error:
        raise NotTests("should hold Python, or a list of {input, output} strings") from error


def lines(text: bytes) -> list[bytes]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
