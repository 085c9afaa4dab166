"""Tells which statements of Python tests are tests, and which of them can fail."""

from __future__ import annotations

import ast
import re

# Statements that prepare something for the tests after them.
SETUP_STATEMENTS = (
    *(ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef),
    *(ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Delete, ast.Pass),
)
# Library functions that raise or exit if something is wrong.
CHECK_FUNCTION = re.compile(r"(assert|fail|raises|debug$|exit$|expect$|quit$)")


def is_test(statement: ast.stmt) -> bool:
    """Returns whether a statement is a test: it calls something, asserts or raises.

    An expression whose value is not used, such as `f(1) == 2` or a text, is no test.
    """
    if isinstance(statement, SETUP_STATEMENTS):
        return False
    return any(
        is_check(node)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call | ast.Await))
        for node in ast.walk(statement)
    )


def can_fail(statement: ast.stmt) -> bool:
    """Returns whether a statement contains something that fails if a result is wrong."""
    return any(map(is_check, ast.walk(statement)))


def is_check(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return not is_always_true(node.test)
    if isinstance(node, ast.Call):
        return CHECK_FUNCTION.match(ast.unparse(node.func).rpartition(".")[2]) is not None
    return isinstance(node, ast.Raise)


def is_always_true(node: ast.expr) -> bool:
    """Returns whether an assert of it always passes: a text, or a tuple with the message in it."""
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
        return any(map(is_always_true, node.values))
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return bool(node.elts)
    if isinstance(node, ast.Constant):
        return bool(node.value)
    return isinstance(node, ast.Lambda | ast.GeneratorExp)
