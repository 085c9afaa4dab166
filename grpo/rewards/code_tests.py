"""Reads the tests of a program from a row: Python that uses it, or inputs and outputs."""

from __future__ import annotations

import ast
import builtins
import json
import math
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from grpo.rewards.statements import can_fail, is_check, is_test

PARSER = threading.Lock()  # used by two threads, CPython 3.11's can raise SystemError
PARSE_ERRORS = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError)


class InvalidTests(Exception):
    """A column does not hold tests as `Code` describes them."""


@dataclass(frozen=True)
class PythonTests:
    """Pieces of Python, run one after the other with the program's names."""

    pieces: tuple[str, ...]
    is_test_piece: tuple[bool, ...]  # whether each piece is a test, or only prepares one
    reserved: tuple[str, ...]  # names that stay Python's own, even if the program defines them
    passes_errors: bool  # whether a `with` may hold a test, so that it must not suppress errors


@dataclass(frozen=True)
class InputOutput:
    """For each test, the input of the program and the output that it must print."""

    pairs: tuple[tuple[bytes, bytes], ...]


def read_tests(column: Any) -> PythonTests | InputOutput | None:
    """Reads the tests in a row's column; returns None if there are none.

    Raises:
        InvalidTests: the tests can't be read, or check nothing.
    """
    tests = parse_literal(column) if isinstance(column, str) else column
    if tests is None or (isinstance(tests, float) and math.isnan(tests)):
        return None
    if isinstance(tests, str):
        return read_asserts([tests], text_is_test=False) if tests.strip() else None
    if isinstance(tests, Mapping):
        tests = list(pair_columns(tests))
    if not isinstance(tests, list | tuple):
        raise InvalidTests(f"is a {type(tests).__name__}, should be a string, a list or an object")
    tests = [parse_literal(test) if isinstance(test, str) else test for test in tests]
    if not tests:
        return None
    if all(isinstance(test, str) for test in tests):
        return read_asserts(tests, text_is_test=True)
    if not all(isinstance(test, Mapping) and {"input", "output"} <= set(test) for test in tests):
        raise InvalidTests("should hold Python, or a list of {input, output}")
    if any(test.get("fn_name") for test in tests):
        calls = tuple(write_call(test) for test in tests)
        return PythonTests(calls, (True,) * len(calls), ("globals",), passes_errors=True)
    if any(test.get("testtype") == "functional" for test in tests):
        raise InvalidTests("calls a function, but doesn't say which: add its fn_name to each test")
    pairs = tuple((encode_lines(test["input"]), encode_lines(test["output"])) for test in tests)
    if not any(wanted.strip() for _, wanted in pairs):
        raise InvalidTests("expects no output, so it checks nothing")
    return InputOutput(pairs)


def parse_literal(text: str) -> Any:
    """Returns the list or object that a text holds in JSON or as a literal; else the text."""
    if not text.lstrip().startswith(("[", "{", '"', "(")):
        return text
    try:
        value = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        try:
            with PARSER:
                value = ast.literal_eval(text.strip())
        except PARSE_ERRORS:
            return text
        return value if isinstance(value, list | tuple | dict) else text
    return parse_literal(value) if isinstance(value, str) else value


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def pair_columns(tests: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yields each test of {inputs: [...], outputs: [...]}, or the one of {input, output}."""
    keys = next((k for k in (("inputs", "outputs"), ("input", "output")) if k[0] in tests), None)
    if keys is None and not tests:
        return
    if keys is None or not set(keys) <= set(tests):
        raise InvalidTests("is an object, which should have inputs and outputs")
    inputs, outputs = (tests[key] for key in keys)
    if keys == ("input", "output") and isinstance(inputs, str) and isinstance(outputs, str):
        inputs, outputs = [inputs], [outputs]
    if not (isinstance(inputs, list | tuple) and isinstance(outputs, list | tuple)):
        raise InvalidTests(f"should hold lists of {keys[0]} and {keys[1]}")
    if len(inputs) != len(outputs):
        raise InvalidTests(f"has {len(inputs)} {keys[0]} and {len(outputs)} {keys[1]}")
    for test_input, output in zip(inputs, outputs, strict=True):
        yield {"input": test_input, "output": output, "fn_name": tests.get("fn_name")}


def encode_lines(value: Any) -> bytes:
    """Encodes an input or output: a text, an integer, or a list of lines."""
    values = value if isinstance(value, list | tuple) else [value]
    for line in values:
        if not isinstance(line, str | int) or isinstance(line, bool):
            raise InvalidTests(
                f"has a {type(line).__name__} as input or output, should be a string"
            )
    return "\n".join(map(str, values)).encode(errors="replace")


def write_call(test: Mapping[str, Any]) -> str:
    """Writes a test as an assert that calls a function, or a method of `Solution`.

    The input is a list of arguments, or a text with one argument in JSON on each line. The result
    is compared as JSON, where tuples are lists. If a list of one element is expected, the element
    by itself is right, too.
    """
    name, arguments, wanted = test["fn_name"], test["input"], test["output"]
    if not isinstance(name, str) or not name.isidentifier():
        raise InvalidTests(f"has {name!r} as fn_name, which names no function")
    try:
        if isinstance(arguments, str):
            arguments = [json.loads(line) for line in arguments.splitlines() if line.strip()]
            wanted = json.loads(wanted) if isinstance(wanted, str) else wanted
        if not isinstance(arguments, list | tuple):
            raise TypeError(f"{type(arguments).__name__} instead of a list")
        wanted = json.loads(json.dumps(wanted, allow_nan=False))
        arguments = json.loads(json.dumps(arguments, allow_nan=False))
    except PARSE_ERRORS as error:
        raise InvalidTests(
            f"has arguments or a result of {name} that are not JSON ({error})"
        ) from error
    right = [wanted, *(wanted if isinstance(wanted, list) and len(wanted) == 1 else ())]
    function = f"(Solution().{name} if 'Solution' in globals() else {name})"
    return f"import json\nassert json.loads(json.dumps({function}(*{arguments!r}))) in {right!r}"


def read_asserts(tests: Sequence[str], text_is_test: bool) -> PythonTests:
    """Reads tests in Python.

    Functions `test…` and the methods of a `unittest.TestCase` are tests, too, as in pytest.

    Args:
        text_is_test: whether each text is one test; else each statement is.

    Raises:
        InvalidTests: a text is not Python, or nothing in the tests can fail.
    """
    try:
        modules = [parse_python(text) for text in tests]
        body = [statement for module in modules for statement in module]
        found = list(write_test_calls(body))
        body = [statement for statement in body if not runs_unittest(statement)]
        if not text_is_test:
            modules = [[statement] for statement in body]
        modules += [parse_python(text) for text in found]
        everything = [statement for module in modules for statement in module]
        if not any(map(can_fail, drop_unused(everything))):
            raise InvalidTests("checks nothing: there is no assert, or none that can fail")
        modules = [module for module in modules if module]
        pieces = tuple(ast.unparse(ast.Module(module, [])) for module in modules)
        counted = tuple(any(map(is_test, module)) for module in modules)
        return PythonTests(
            pieces, counted, find_reserved_names(everything), has_tests_in_with(everything)
        )
    except PARSE_ERRORS as error:
        raise InvalidTests(f"is not Python ({type(error).__name__}: {error})") from error


def parse_python(text: str) -> list[ast.stmt]:
    with PARSER:
        return ast.parse(text).body


def find_reserved_names(body: Sequence[ast.stmt]) -> tuple[str, ...]:
    """Finds the names that tests take from Python: builtins, and modules with an attribute.

    A program's own `abs` or `math` must not decide a test. But if the only name that tests use is
    one builtin's, as in `assert sum(10, 15) == 6`, then they test the program's function.
    """
    nodes = [node for statement in body for node in ast.walk(statement)]
    loaded = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    free = loaded - find_bound_names(nodes)
    reserved = {name for name in free if hasattr(builtins, name)}
    if reserved == free and len(reserved) == 1:
        reserved = set()
    spaces = {
        node.value.id
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    return tuple(sorted(reserved | (spaces & free & sys.stdlib_module_names)))


def find_bound_names(nodes: Sequence[ast.AST]) -> set[str]:
    """Returns the names that tests define, assign, import or have as a parameter."""
    bound = set()
    for node in nodes:
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
    return bound


def has_tests_in_with(body: Sequence[ast.stmt]) -> bool:
    """Returns whether a `with` of the tests contains a check, or calls one of their functions."""
    nodes = [node for statement in body for node in ast.walk(statement)]
    bound = find_bound_names(nodes)
    inside = [
        node
        for with_ in nodes
        if isinstance(with_, ast.With | ast.AsyncWith)
        for statement in with_.body
        for node in ast.walk(statement)
    ]
    return any(
        (is_check(node) and not isinstance(node, ast.Raise))
        or (isinstance(node, ast.Call) and bool(list_names(node.func) & bound))
        for node in inside
    )


def write_test_calls(body: Sequence[ast.stmt]) -> Iterator[str]:
    """Writes calls of the test functions and methods that the tests don't call themselves."""
    for statement in body:
        others = [other for other in body if other is not statement and not runs_unittest(other)]
        if isinstance(statement, ast.FunctionDef) and statement.name.startswith("test"):
            plain = not ast.unparse(statement.args)
            if plain and not any(statement.name in list_names(other) for other in others):
                yield f"{statement.name}()"
        elif isinstance(statement, ast.ClassDef) and any(
            ast.unparse(base).rpartition(".")[2] == "TestCase" for base in statement.bases
        ):
            yield f"{statement.name}.setUpClass() is None"
            for method in statement.body:
                if isinstance(method, ast.FunctionDef) and method.name.startswith("test"):
                    yield f"{statement.name}({method.name!r}).debug()"


def runs_unittest(statement: ast.stmt) -> bool:
    """Returns whether this is `unittest.main()`, which reports and exits, but never raises."""
    return isinstance(statement, ast.Expr) and ast.unparse(statement).startswith("unittest.main(")


def drop_unused(body: Sequence[ast.stmt]) -> list[ast.stmt]:
    """Drops the functions and classes that no other statement names."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [
        statement
        for statement in body
        if not isinstance(statement, definitions)
        or any(statement.name in list_names(other) for other in body if other is not statement)
    ]


def list_names(code: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(code) if isinstance(node, ast.Name)}
