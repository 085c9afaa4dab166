"""The tests' side of the pipes, in the grader's process.

The program learns the arguments of its calls, and the operations on its objects. It gets no text of
the tests and no value that is only compared with. It can't go further from what it gets: it can
only call a function, and for an object whose class the tests define it can use the public
attributes and the operators.

This side decides, and never the program:

- whether an object of the program's equals, is less than, or is in a value of another origin. An
  object whose class derives from a plain class brings its value, and is compared by that. Any other
  object equals only objects of the program's, and `in` goes through its elements.
- the result of arithmetic with a value of another origin. The program computes it, but the result
  can't become a number again: an object whose difference from every number is 0 equals no number.
- the class of an object, and which `except` catches an exception. A class of the program's keeps
  the bases that it declared, and its name catches no failed assert.
- the meaning of `abs`, `math` and other names of Python. If the program imports `math` or another
  harmless module, the tests get the same from their own process.

The program decides only what a return value could decide, too: the length, truth and text of its
own objects, how two of them compare, whether it calls a function that it gets, and how it changes a
list that it gets, now or later.

Tests must not run text or code from the program. `eval`, `exec`, `compile`, `pickle` and `doctest`
refuse to; a test that uses `timeit`, `marshal` or the like on it gives the program this process.
"""

from __future__ import annotations

import builtins
import functools
import io
import sys
import types

from grpo.verifiers.operations import OPERATIONS, VALUE_TYPES
from grpo.verifiers.proxy import Peer
from grpo.verifiers.serialization import CONTAINERS, SCALARS
from grpo.verifiers.standard_library import (
    CATCH_ALL_EXCEPTIONS,
    find_in_library,
    import_again,
    import_class,
    list_streams,
)

TYPE_CHECKING = False  # see confine.py
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

ARITHMETIC_TYPES = {int, float, complex, bool, str, bytes, list, tuple}
VALUE_ATTRIBUTES = {
    name for kind in (*VALUE_TYPES, *CONTAINERS) for name in dir(kind) if name[0] != "_"
}
VALUE_ATTRIBUTES |= {"days", "seconds", "microseconds", "total_seconds", "quantize", "is_zero"}
PRIVATE_TYPES = (types.ModuleType, types.FrameType, types.CodeType, types.TracebackType, Peer)
HARMLESS_TYPES = {*SCALARS, int, bytes, tuple, frozenset, *CONTAINERS, io.StringIO, io.BytesIO}
CHANGING_OPERATIONS = {"setattr", "delattr", "setitem", "delitem"}


class Grader(Peer):
    """Lets tests use a program in another process.

    Args:
        module: where the tests run, with the program's names.
        reserved: names that the program can't define for the tests.
        passes_errors: whether the program's context managers must not suppress the tests' errors.
    """

    def __init__(
        self,
        module: types.ModuleType,
        reserved: Sequence[str],
        passes_errors: bool,
        incoming: int,
        outgoing: int,
    ) -> None:
        super().__init__(0, incoming, outgoing, asks_first=True)
        self.module = module
        self.mixed_results: set[int] = set()  # ids of results of arithmetic with the tests' values
        self.given_names: dict[str, Any] = {}  # the program's names, as put into the module
        self.reserved = set(reserved)
        self.passes_errors = passes_errors
        self.streams = list_streams()
        self.replaced_streams: list[tuple[str, int]] = []
        for name, how, value in self.ask("names"):
            if how == "import":
                self.import_for_tests(name, *value)
            elif how == "value":
                self.put_name(name, value)

    def import_for_tests(self, name: Any, module: Any, imported: Any) -> None:
        """Gives the tests what the program imported, under the same name, from this process."""
        same = imported in ("", name) and (name == module or name not in sys.stdlib_module_names)
        if same and not name.startswith("__") and not (self.reserved & {name} & set(dir(builtins))):
            vars(self.module)[name] = import_again(module, imported)

    def put_name(self, name: Any, value: Any) -> None:
        space = vars(self.module)
        if type(name) is not str or name in self.reserved or name.startswith("__"):
            return
        if name not in space or space[name] is self.given_names.get(name, self):
            space[name] = self.given_names[name] = value

    def collect_extra(self) -> Any:
        """Returns what tests put in place of streams, `input` and `print`, if that has changed."""
        replaced = [
            (name, getattr(place, name))
            for name, (place, usual) in self.streams.items()
            if getattr(place, name) is not usual
        ]
        now = [(name, id(value)) for name, value in replaced]
        before, self.replaced_streams = self.replaced_streams, now
        self.undo.append(lambda: setattr(self, "replaced_streams", before))
        return tuple(replaced) if now != before else None

    def apply_extra(self, extra: Any) -> None:
        for name, value in zip(*[iter(extra or ())] * 2, strict=True):
            self.put_name(name, value)

    def import_name(self, module: str, name: str) -> Any:
        if (module, name) in CATCH_ALL_EXCEPTIONS:
            raise TypeError(f"{name} under another name")
        return import_class(module, name)

    def find_name(self, value: Any) -> tuple[str, str] | None:
        return find_in_library(value)

    # What tests do with objects of the program's

    def ask(self, operation: str, *operands: Any, **options: Any) -> Any:
        try:
            result = self.channel.ask(operation, *operands, **options)
        except (StopIteration, StopAsyncIteration) as stop:
            if operation in ("next", "send", "throw"):
                raise
            # Anywhere else it would end a loop of the tests early, without an error.
            raise RuntimeError(f"{operation} raised {type(stop).__name__}") from stop
        return bool(result) and not self.passes_errors if operation == "exit" else result

    def read(self, owner: Any, name: str) -> Any:
        if id(owner) in self.mixed_results and name in VALUE_ATTRIBUTES:
            raise AttributeError(f"{name}: of a result of arithmetic with a value of the tests'")
        value = super().read(owner, name)
        if name == "__annotations__" and not self.are_annotations(value):
            raise AttributeError(name)
        return hide_examples(value) if name == "__doc__" else value

    def make_class(self, name: str, doc: Any, *rest: Any) -> type:
        return super().make_class(name, hide_examples(doc), *rest)

    def are_annotations(self, value: Any) -> bool:
        """Returns whether no annotation is a text, which `typing.get_type_hints` would run."""
        return type(value) is dict and not any(isinstance(v, str) for v in value.values())

    def operate(self, operation: str, *operands: Any) -> Any:
        foreign = [operand for operand in operands if not self.is_proxy(operand)]
        if operation in ("round", "format"):  # their operand is a number of digits or a format
            foreign = []
        if any(type(operand) not in ARITHMETIC_TYPES for operand in foreign):
            return NotImplemented
        result = self.ask(operation, *operands)
        if foreign or any(id(operand) in self.mixed_results for operand in operands):
            if not self.is_opaque(result):
                raise TypeError(
                    f"{operation} of an object of the program's and a value of the tests'"
                )
            self.mixed_results.add(id(result))
        return result

    def is_opaque(self, value: Any) -> bool:
        """Returns whether a value is an object of the program's without a plain value."""
        kind = type(value)
        if not isinstance(kind, self.metaclass) or self.find_container(kind):
            return False
        return not any(base in VALUE_TYPES or base is BaseException for base in kind.__mro__)

    def compare(self, operation: str, one: Any, other: Any) -> Any:
        if self.is_proxy(other):
            return super().compare(operation, one, other) is True
        kind = next((base for base in type(one).__mro__ if base in VALUE_TYPES), None)
        container = self.find_container(type(one))
        if container and not self.channel.is_busy():
            kind, one = container, self.ask("contents", one)
            if type(one) is not kind:
                return NotImplemented
        return getattr(kind, f"__{operation}__")(one, other) if kind else NotImplemented

    def find_container(self, kind: type) -> type | None:
        return next(
            (self.container_bases[k] for k in kind.__mro__ if k in self.container_bases), None
        )

    def contains(self, container: Any, item: Any) -> Any:
        if self.is_proxy(item):
            return super().contains(container, item) is True
        return any(item is element or item == element for element in container)

    # What the program does with values of the tests'

    def check_shareable(self, value: Any) -> None:
        if isinstance(value, PRIVATE_TYPES):
            raise TypeError(f"the program can't get a {type(value).__name__} of the tests'")

    def serve(self, operation: str, operands: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Executes the program's operation on a value that it was given, and on no other value."""
        if not any(id(operand) in self.exported_numbers for operand in operands[:2]):
            raise TypeError("this value was not given to the program")
        owner = operands[0]
        if operation == "getattr":
            return self.read_for_program(*operands)
        if operation in CHANGING_OPERATIONS and not self.may_change(owner, *operands[1:]):
            raise TypeError(f"the program can't change a {type(owner).__name__}")
        if operation == "call" and not self.may_call(owner):
            raise TypeError(f"the program can't call a {type(owner).__name__}")
        return OPERATIONS[operation](*operands, **options)

    def read_for_program(self, owner: Any, name: Any) -> Any:
        if type(name) is not str:
            raise TypeError("the name of an attribute must be a string")
        if name in ("__name__", "__qualname__", "__doc__") and self.may_call(owner):
            return str(getattr(owner, name))
        streams = type(owner) in (io.StringIO, io.BytesIO)
        hidden = name.startswith("_") or (isinstance(owner, type) and hasattr(type, name))
        if is_mock(owner):  # through its methods, the program could fake calls of it
            hidden = hidden or hasattr(sys.modules["unittest.mock"].Mock, name)
        if hidden or not (self.is_defined_by_tests(owner) or is_mock(owner) or streams):
            raise AttributeError(name)
        return getattr(owner, name)

    def is_defined_by_tests(self, value: Any) -> bool:
        """Returns whether this is a class that the tests define, or an instance of one."""
        kind = value if isinstance(value, type) else type(value)
        return kind.__module__ == self.module.__name__ and not isinstance(kind, self.metaclass)

    def may_change(self, owner: Any, key: Any, *value: Any) -> bool:
        if isinstance(owner, type) or not self.is_defined_by_tests(owner):
            return False
        if type(key) is not str:
            return True
        return not key.startswith("_") and not callable(getattr(type(owner), key, None))

    def may_call(self, value: Any) -> bool:
        if isinstance(value, types.FunctionType):
            return value.__globals__ is vars(self.module)
        if isinstance(value, types.MethodType):
            return self.may_call(value.__func__)
        if isinstance(value, types.BuiltinMethodType):
            return type(value.__self__) in HARMLESS_TYPES
        if isinstance(value, functools.partial):
            return self.may_call(value.func)
        if isinstance(value, functools._lru_cache_wrapper):
            return self.may_call(value.__wrapped__)
        return self.is_defined_by_tests(value) or is_mock(value)


def hide_examples(doc: Any) -> Any:
    """Returns a docstring without the examples that `doctest` would run."""
    return doc.replace(">>>", "...") if type(doc) is str else None


def is_mock(value: Any) -> bool:
    mock = sys.modules.get("unittest.mock")
    return mock is not None and isinstance(value, mock.NonCallableMock)
