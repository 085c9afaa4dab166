"""The operations on objects of the other side, and the proxy classes that ask for them."""

from __future__ import annotations

import math
import operator
from importlib import import_module

from grpo.verifiers.serialization import CONTAINERS

TYPE_CHECKING = False  # see confine.py
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    class Peer(Protocol):
        """The part of `proxy.Peer` that this module uses."""

        hashes: dict[int, int]
        building_class: bool

        def ask(self, operation: str, *operands: Any, **options: Any) -> Any: ...

        def operate(self, operation: str, *operands: Any) -> Any: ...

        def compare(self, operation: str, one: Any, other: Any) -> Any: ...

        def contains(self, container: Any, item: Any) -> Any: ...

        def read(self, value: Any, name: str) -> Any: ...


# An object whose class derives from one of these brings its value; this makes the plain value.
VALUE_TYPES: dict[type, Callable[[Any], Any]] = {
    int: int.__pos__,
    float: float.__pos__,
    complex: complex.__pos__,
    str: str.__str__,
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
    tuple: lambda value: tuple.__getitem__(value, slice(None)),
    frozenset: lambda value: frozenset.union(frozenset(), value),
}
# The dunder attributes that a proxy has; Python's own tools ask for many more.
READABLE_ATTRIBUTES = {
    *("__name__", "__qualname__", "__doc__", "__annotations__", "__dict__", "__members__"),
    "__slots__",
}
ARITHMETIC = (
    *("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "divmod"),
    *("and", "or", "xor", "lshift", "rshift"),
)
UNARY = {
    f"__{name}__": name
    for name in (
        *("len", "bool", "int", "float", "complex", "index", "abs", "neg", "pos", "invert"),
        *("trunc", "floor", "ceil", "round", "length_hint"),
    )
}
BINARY = {
    **{f"__{name}__": name for name in ARITHMETIC},
    **{f"__r{name}__": name for name in ARITHMETIC},
    **{f"__i{name}__": f"i{name}" for name in ARITHMETIC if name != "divmod"},
}
COMPARISONS = {f"__{name}__": name for name in ("eq", "ne", "lt", "le", "gt", "ge")}
SPECIAL = {
    f"__{name}__": name
    for name in (
        *("hash", "contains", "str", "repr", "format", "iter", "next", "reversed", "call"),
        *("getitem", "setitem", "delitem", "enter", "exit", "fspath"),
    )
}


def copy_contents(value: Any) -> Any:
    """Copies an object whose class derives from a container into that plain container."""
    kind = next(base for base in type(value).__mro__ if base in CONTAINERS)
    return kind(list(value.items()) if isinstance(value, dict) else list(value))


OPERATIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, f"__{name}__") for name in (*ARITHMETIC[:8], *ARITHMETIC[9:])},
    **{name: getattr(operator, f"__{name}__") for name in BINARY.values() if name.startswith("i")},
    **{name: getattr(operator, f"__{name}__") for name in COMPARISONS.values()},
    **{name: getattr(operator, f"__{name}__") for name in ("getitem", "setitem", "delitem")},
    **{name: getattr(operator, f"__{name}__") for name in ("index", "neg", "pos", "invert")},
    **{kind.__name__: kind for kind in (bool, int, float, complex, str, reversed)},
    "divmod": divmod,
    "pow": pow,
    "len": len,
    "abs": abs,
    "round": round,
    "repr": repr,
    "format": format,
    "iter": iter,
    "next": next,
    "contains": operator.contains,
    "trunc": math.trunc,
    "floor": math.floor,
    "ceil": math.ceil,
    "length_hint": operator.length_hint,
    "copy": lambda value: import_module("copy").copy(value),
    "deepcopy": lambda value: import_module("copy").deepcopy(value),
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
    "call": lambda value, /, *operands, **options: value(*operands, **options),
    "enter": lambda value: type(value).__enter__(value),
    "exit": lambda value, *error: type(value).__exit__(value, *error),
    "fspath": lambda value: type(value).__fspath__(value),
    "send": lambda value, sent: value.send(sent),
    "throw": lambda value, error: value.throw(error),
}


def make_method(peer: Peer, name: str) -> Callable[..., Any]:
    """Makes the method of a proxy class that asks the other side for an operator.

    Raises:
        KeyError: there is no such operator.
    """
    if name in UNARY:
        operation = UNARY[name]
        return lambda self, *digits: peer.operate(operation, self, *digits)
    if name in COMPARISONS:
        operation = COMPARISONS[name]
        return lambda self, other: peer.compare(operation, self, other)
    if name in BINARY:
        operation = BINARY[name]
        if name == f"__r{operation}__":
            return lambda self, other: peer.operate(operation, other, self)
        return lambda self, other, *modulus: peer.operate(operation, self, other, *modulus)
    operation = SPECIAL[name]
    if name == "__hash__":
        return lambda self: find_hash(peer, self)
    if name == "__contains__":
        return lambda self, item: peer.contains(self, item)
    if name == "__exit__":
        return lambda self, kind, error, trace: peer.ask("exit", self, kind, error, None)
    if name == "__format__":
        return lambda self, how: peer.operate("format", self, how) if how else str(self)
    return lambda self, /, *operands, **options: peer.ask(operation, self, *operands, **options)


def find_hash(peer: Peer, value: Any) -> int:
    if id(value) not in peer.hashes:
        raise TypeError(f"unhashable type: {type(value).__name__!r}")
    return peer.hashes[id(value)]


def make_doc(peer: Peer, doc: Any) -> Any:
    """Makes the `__doc__` of a proxy class, which differs from that of its instances."""

    class Doc:
        def __get__(self, instance: Any, owner: Any) -> Any:
            return doc if instance is None else peer.read(instance, "__doc__")

    return Doc()


def make_error(kind: Any, arguments: Any) -> BaseException:
    """Makes an exception of a class of exceptions, without its constructor if that refuses."""
    if not (isinstance(kind, type) and issubclass(kind, BaseException)):
        raise TypeError("not an exception")
    try:
        return kind(*arguments)
    except Exception:  # noqa: BLE001 - its constructor takes other arguments than its args
        error = kind.__new__(kind, *arguments)
        error.args = arguments
        return error


def make_root(peer: Peer) -> tuple[Any, type]:
    """Makes the metaclass of all proxy classes, and the class that they all derive from.

    One function despite its length: both classes need each other and the peer.
    """

    class Class(type):
        def __new__(cls, name: str, bases: tuple[type, ...], space: dict[str, Any]) -> Any:
            if bases and not peer.building_class:
                raise TypeError(f"{name}: no class can derive from one of the program's")
            return super().__new__(cls, name, bases, space)

        def __call__(cls, *operands: Any, **options: Any) -> Any:
            return peer.ask("call", cls, *operands, **options)

        def __getattr__(cls, name: str) -> Any:
            return peer.read(cls, name)

        def __setattr__(cls, name: str, value: Any) -> None:
            peer.ask("setattr", cls, name, value)

        def __delattr__(cls, name: str) -> None:
            peer.ask("delattr", cls, name)

        def __getitem__(cls, key: Any) -> Any:
            return peer.ask("getitem", cls, key)

        def __iter__(cls) -> Any:
            return peer.ask("iter", cls)

        def __len__(cls) -> Any:
            return peer.ask("len", cls)

        def __bool__(cls) -> bool:
            return True

        def __contains__(cls, item: Any) -> Any:
            return peer.contains(cls, item)

    class Root(metaclass=Class):
        __slots__ = ()
        __hash__ = object.__hash__

        def __getattr__(self, name: str) -> Any:
            return peer.read(self, name)

        def __setattr__(self, name: str, value: Any) -> None:
            peer.ask("setattr", self, name, value)

        def __delattr__(self, name: str) -> None:
            peer.ask("delattr", self, name)

        def __copy__(self) -> Any:
            return peer.ask("copy", self)

        def __deepcopy__(self, memo: Any) -> Any:
            return peer.ask("deepcopy", self)

        def __reduce_ex__(self, protocol: Any) -> Any:
            raise TypeError("a proxy can't be pickled")

        for operator_ in COMPARISONS:
            locals()[operator_] = make_method(peer, operator_)
        del operator_

    return Class, Root
