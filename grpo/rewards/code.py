"""A reward for programs that pass their tests."""

from __future__ import annotations

import logging
import re
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from grpo.data.answers import extract_tagged_answer
from grpo.errors import ConfigError
from grpo.rewards.code_tests import InputOutput, InvalidTests, PythonTests, read_tests
from grpo.rewards.option_checks import require_at_least, require_positive
from grpo.types import Failure, Sample
from grpo.verifiers.confine import detect_landlock_version
from grpo.verifiers.process_spec import SandboxLimits
from grpo.verifiers.start_sandbox import GraderArguments, SandboxError, run_script, run_tests

log = logging.getLogger(__name__)

CODE_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
PYTHON_LANGUAGES = ("python", "python3", "py")


class Code:
    """The share of its tests that a Python program passes.

    The program is the last ```python fence of the last `<answer>…</answer>`, else its last fence,
    else all of its text; without the tags, the last such fence of the completion. A column of the
    row holds its tests:

    - a string of Python: each statement that asserts, raises or calls something is a test;
    - a list of such strings, each one test. In both, functions `test…` without arguments and the
      methods of a `unittest.TestCase` are called, as pytest does;
    - a list of `{input, output}`: the program reads the input and must print the output, apart from
      white space at the ends of lines. It is run once for each pair;
    - an object `{inputs: [...], outputs: [...]}`, which means the same. With a `fn_name`, that
      function, or method of `Solution`, is called with each input, a list of arguments;
    - any of these as a string, in JSON or as a Python literal.

    A program that reads and prints is run like `python answer.py`, and must end with exit code 0.
    Any other is imported, so its `__name__` is not `"__main__"`.

    The reward does not apply to a row without tests. It is 0 for a program that fails, crashes,
    hangs or exceeds a limit, and for a completion without a program. It is a failure only where the
    program could not be run, or where the tests can't be read or check nothing, since a test that
    passes without any program is no test. `grpo.verifiers.sandbox` says what a program may do.

    What a program prints is compared outside its process. Tests in Python run in a second process
    and use the program over two pipes, at about 0.2 ms a call. The program learns the arguments of
    its calls and the operations on its objects. It gets no text of the tests and no expected value,
    and it decides no comparison with one. `grpo.verifiers.grader` has the details. The program does
    decide how two of its own objects compare: `assert f(2) == Point(1, 2)` only checks the
    program's own `Point.__eq__`. It also decides whether it calls a function that tests pass to it.

    A correct program fails tests that do one of these:

    - derive a class from one of the program's;
    - look at source, signatures or frames, or use `dataclasses.asdict` or `pickle` on its objects;
    - compare an object of the program's with a value, by `==`, `<` or `in`, unless its class
      derives from that of the value (`in` works where it can be iterated);
    - need a number from arithmetic with an object of the program's and a value;
    - write a file that the program reads, or read a file that it writes;
    - set the seed of `random` or a global variable for the program;
    - use `async with` or `async for` on its objects, or give it a coroutine;
    - need a context manager of the program's to suppress an error, and check something in a `with`;
    - `eval` a text that is not written in the tests;
    - call a function of the program's by a builtin's name, such as `abs`, and use other names too.

    Args:
        column: the column of the row that holds the tests.
        strict: 1 if all tests pass, else 0, instead of the share that passes.
        seconds: time limit of one run, for wall time and for CPU time.
        memory_mb: limit on the address space of one run.
        file_mb: limit on all files of one run, and on what it prints where that is compared.
        workers: programs that run at the same time.
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
        require_at_least(1, memory_mb=memory_mb, file_mb=file_mb, workers=workers)
        require_positive(seconds=seconds)
        self.column = column
        self.strict = strict
        self.workers = workers
        try:
            self.limits = SandboxLimits(seconds, memory_mb, file_mb, detect_landlock_version())
        except OSError as error:
            raise ConfigError(f"grpo.rewards.Code can't confine programs here: {error}.") from error
        self.threads: ThreadPoolExecutor | None = None
        self.warned = False
        # The indices of the pieces that an empty program fails.
        self.effective_pieces: dict[PythonTests, list[int]] = {}

    def __call__(self, samples: Sequence[Sample]) -> list[float | Failure | None]:
        if not self.warned and not any(self.column in s.example.columns for s in samples):
            log.warning(
                "column=%s: no row of this batch has this column, so the reward applies to none",
                self.column,
            )
            self.warned = True
        if self.threads is None:
            self.threads = ThreadPoolExecutor(self.workers, thread_name_prefix="code")
        return list(self.threads.map(self.score, samples))

    def close(self) -> None:
        if self.threads is not None:
            self.threads.shutdown(cancel_futures=True)
            self.threads = None

    def score(self, sample: Sample) -> float | Failure | None:
        program = extract_program(sample.completion)
        try:
            tests = read_tests(sample.example.columns.get(self.column))
            if tests is None:
                return None
            if isinstance(tests, PythonTests):
                passed = self.grade_asserts(program, tests)
            else:
                passed = self.grade_pairs(program, tests)
        except SandboxError as error:
            return Failure(f"the program could not be run: {error}")
        except InvalidTests as error:
            return Failure(f"column {self.column}: {error}")
        return float(all(passed)) if self.strict else sum(passed) / len(passed)

    def grade_pairs(self, program: str, tests: InputOutput) -> list[bool]:
        """Returns whether each test passed; in strict mode, stops after the first that didn't."""
        most = self.limits.file_mb << 20
        if any(len(wanted) > most for _, wanted in tests.pairs):
            raise InvalidTests(f"expects more output than file_mb={self.limits.file_mb} allows")
        passed = []
        for script_input, wanted in tests.pairs:
            run = run_script(encode_source(program), script_input, self.limits)
            passed.append(run.exit_code == 0 and split_lines(run.printed) == split_lines(wanted))
            if self.strict and not passed[-1]:
                break
        return passed

    def grade_asserts(self, program: str, tests: PythonTests) -> list[bool]:
        if tests not in self.effective_pieces:
            without = self.run_asserts("", tests)
            self.effective_pieces[tests] = [
                n for n, is_test in enumerate(tests.is_test_piece) if is_test and not without[n]
            ]
        checking = self.effective_pieces[tests]
        if not checking:
            raise InvalidTests("passes without any program, so it checks nothing")
        passed = self.run_asserts(program, tests)
        return [passed[n] for n in checking]

    def run_asserts(self, program: str, tests: PythonTests) -> list[bool]:
        """Returns whether each piece of the tests ran to its end."""
        pieces = [encode_source(piece).decode() for piece in tests.pieces]
        arguments = GraderArguments(pieces, tests.reserved, tests.passes_errors)
        return run_tests(encode_source(program), arguments, self.limits)


def extract_program(completion: str) -> str:
    """Returns the program in a completion; empty if there is none."""
    answer = extract_tagged_answer(completion)
    fences = CODE_FENCE.findall(completion if answer is None else answer)
    if fences:
        python = [code for language, code in fences if language.lower() in PYTHON_LANGUAGES]
        return textwrap.dedent(python[-1] if python else fences[-1][1])
    return answer or ""


def encode_source(text: str) -> bytes:
    return text.encode(errors="replace")


def split_lines(text: bytes) -> list[bytes]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
