"""Writes Python's plain data as JSON and reads it back, for two processes that don't trust each
other. Reading never runs code from the message.

Plain data are values of exactly these types: None, bool, int, float, complex, str, bytes,
bytearray, list, tuple, set, frozenset, dict, range, those of `collections`, Decimal, Fraction,
date, time, datetime, timedelta and timezone. Subclasses decide about all other types.

A list, dict, set or other container that can change is shared: both sides keep it while both use
it, and each message has the changes since the last one.
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from functools import partial
from operator import is_

TYPE_CHECKING = False  # see confine.py
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

    Take = Callable[[Any], list[Any]]
    Refill = Callable[[Any, list[Any]], None]

MAX_DEPTH = 200  # lists within lists
LARGE_INT = 2**63  # larger ones go in hex: decimals are slow, and Python refuses 4300
SCALARS = frozenset({str, float, bool, type(None)})
READ_AS_IS = SCALARS | {int}


def flatten(mapping: Any) -> list[Any]:
    return [part for pair in mapping.items() for part in pair]


def refill_list(container: Any, parts: list[Any]) -> None:
    container[:] = parts


def refill_set(container: Any, parts: list[Any]) -> None:
    container.clear()
    container.update(parts)


def refill_dict(container: Any, parts: list[Any]) -> None:
    container.clear()
    dict.update(container, zip(parts[::2], parts[1::2], strict=True))


def refill_ordered(container: Any, parts: list[Any]) -> None:
    container.clear()
    container.update(zip(parts[::2], parts[1::2], strict=True))


def refill_default(container: Any, parts: list[Any]) -> None:
    container.default_factory = parts[0]
    refill_dict(container, parts[1:])


def refill_deque(container: Any, parts: list[Any]) -> None:
    container.clear()
    container.extend(parts)


CONTAINERS: dict[type, tuple[Take, Refill]] = {
    list: (list, refill_list),
    dict: (flatten, refill_dict),
    set: (list, refill_set),
    bytearray: (list, refill_list),
    deque: (list, refill_deque),
    Counter: (flatten, refill_dict),
    OrderedDict: (flatten, refill_ordered),
    defaultdict: (lambda value: [value.default_factory, *flatten(value)], refill_default),
}
CONTAINER_NAMES = {kind.__name__: kind for kind in CONTAINERS}

# Immutable types by module and name, since only a program that imports one has values of it.
TIME_FIELDS = ("hour", "minute", "second", "microsecond", "tzinfo", "fold")
DATE_FIELDS = ("year", "month", "day")
IMMUTABLE_TYPES: dict[tuple[str, str], Callable[[Any], Iterable[Any]]] = {
    ("builtins", "complex"): lambda value: (value.real, value.imag),
    ("builtins", "bytes"): lambda value: (value.hex(),),
    ("builtins", "range"): lambda value: (value.start, value.stop, value.step),
    ("builtins", "frozenset"): list,
    ("builtins", "tuple"): list,
    ("decimal", "Decimal"): lambda value: (str(value),),
    ("fractions", "Fraction"): lambda value: (value.numerator, value.denominator),
    ("datetime", "date"): lambda value: [getattr(value, name) for name in DATE_FIELDS],
    ("datetime", "time"): lambda value: [getattr(value, name) for name in TIME_FIELDS],
    ("datetime", "datetime"): lambda value: [
        getattr(value, name) for name in (*DATE_FIELDS, *TIME_FIELDS)
    ],
    ("datetime", "timedelta"): lambda value: (value.days, value.seconds, value.microseconds),
    ("datetime", "timezone"): lambda value: (value.utcoffset(None),),
}


def make_with_fold(name: str) -> Callable[..., Any]:
    def make(*parts: Any) -> Any:
        *when, fold = parts
        return getattr(importlib.import_module("datetime"), name)(*when, fold=fold)

    return make


CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "bytes": bytes.fromhex,
    "frozenset": lambda *parts: frozenset(parts),
    "tuple": lambda *parts: parts,
    "time": make_with_fold("time"),
    "datetime": make_with_fold("datetime"),
}
TYPE_MODULES = {name: module for module, name in IMMUTABLE_TYPES}


def is_plain(kind: type) -> bool:
    """Returns whether values of this type are sent by value."""
    known = kind in SCALARS or kind is int or kind in CONTAINERS
    return known or is_immutable_type(kind)


def is_immutable_type(kind: type) -> bool:
    place = (kind.__module__, kind.__qualname__)
    return place in IMMUTABLE_TYPES and getattr(sys.modules.get(place[0]), place[1], None) is kind


class SharedContainer:
    """A container that both sides have, with its elements at the last message."""

    __slots__ = ("container", "parts")

    def __init__(self, container: Any) -> None:
        self.container = container
        self.parts: list[Any] | None = None  # None: not known yet


class ValueCodec:
    """Encodes and decodes the values of one side, and keeps the containers that both share.

    Args:
        first_number: 0 or 1: one side assigns even numbers, the other odd ones.
    """

    def __init__(self, first_number: int) -> None:
        self.next_number = first_number
        self.shared: dict[int, SharedContainer] = {}
        self.shared_numbers: dict[int, int] = {}  # by id of the container
        # Undoes the changes of a message that can't be sent.
        self.undo: list[Callable[[], Any]] = []
        self.unshared_references = count_references(SharedContainer([]))

    def take_number(self) -> int:
        self.next_number += 2
        return self.next_number - 2

    # Writing

    def encode(self, value: Any, depth: int = 0) -> Any:
        kind = type(value)
        if kind in SCALARS:
            return value
        if kind is int:
            return value if -LARGE_INT < value < LARGE_INT else ["int", hex(value)]
        if depth > MAX_DEPTH:
            raise RecursionError("too many values within each other")
        if kind in CONTAINERS:
            return self.encode_container(value, depth)
        if is_immutable_type(kind):
            parts = IMMUTABLE_TYPES[kind.__module__, kind.__qualname__](value)
            return [kind.__name__, *self.encode_all(list(parts), depth)]
        return self.encode_object(value, depth)

    def encode_all(self, values: Sequence[Any], depth: int) -> list[Any]:
        kinds = set(map(type, values))
        small = kinds <= SCALARS or (
            kinds == {int} and -LARGE_INT < min(values) <= max(values) < LARGE_INT
        )
        return list(values) if small else [self.encode(value, depth + 1) for value in values]

    def encode_container(self, value: Any, depth: int) -> Any:
        number = self.shared_numbers.get(id(value))
        if number is not None:
            return ["shared", number]
        number = self.take_number()
        self.share(number, value)
        self.undo.append(lambda: self.forget(number))
        parts = CONTAINERS[type(value)][0](value)
        self.shared[number].parts = parts
        length = [value.maxlen] if type(value) is deque else []
        return [type(value).__name__, number, *length, self.encode_all(parts, depth)]

    def encode_object(self, value: Any, depth: int) -> Any:
        raise NotImplementedError

    # Reading

    def decode(self, code: Any) -> Any:
        """Returns the value that was encoded.

        Raises:
            Exception: of any type, if the code is not valid.
        """
        if type(code) in READ_AS_IS:
            return code
        if type(code) is not list:
            raise ValueError("not a value")
        name, *parts = code
        if name == "int":
            return int(parts[0], 16)
        if name == "shared":
            return self.shared[parts[0]].container
        if name in CONTAINER_NAMES:
            return self.decode_container(CONTAINER_NAMES[name], parts)
        if name in TYPE_MODULES:
            make = CONSTRUCTORS.get(name) or getattr(
                importlib.import_module(TYPE_MODULES[name]), name
            )
            return make(*self.decode_all(parts))
        return self.decode_object(name, parts)

    def decode_all(self, codes: list[Any]) -> list[Any]:
        if set(map(type, codes)) <= READ_AS_IS:
            return list(codes)
        return [self.decode(code) for code in codes]

    def decode_container(self, kind: type, parts: list[Any]) -> Any:
        number, *length, codes = parts
        if type(number) is not int or number in self.shared:
            raise ValueError("a container needs a new number")
        container = kind([], *length) if kind is deque else kind()
        self.share(number, container)  # before its elements, which may contain it
        self.refill(number, codes)
        return container

    def refill(self, number: int, codes: list[Any]) -> None:
        shared = self.shared[number]
        take, refill = CONTAINERS[type(shared.container)]
        refill(shared.container, self.decode_all(codes))
        shared.parts = take(shared.container)

    def decode_object(self, name: str, parts: list[Any]) -> Any:
        raise NotImplementedError

    # Shared containers

    def share(self, number: int, container: Any) -> None:
        self.shared[number] = SharedContainer(container)
        self.shared_numbers[id(container)] = number

    def forget(self, number: int) -> None:
        shared = self.shared.pop(number, None)
        if shared is not None:
            del self.shared_numbers[id(shared.container)]

    def encode_changes(self) -> list[Any]:
        """Returns what changed here since the last message, and what this side no longer uses."""
        changed: list[Any] = []
        dropped: list[int] = []
        for number, shared in list(self.shared.items()):
            if shared.parts is None:
                continue
            parts = CONTAINERS[type(shared.container)][0](shared.container)
            if len(parts) != len(shared.parts) or not all(map(is_, parts, shared.parts)):
                self.undo.append(partial(setattr, shared, "parts", shared.parts))
                shared.parts = parts
                changed.append([number, self.encode_all(parts, 0)])
            elif count_references(shared) == self.unshared_references:
                dropped.append(number)
        return [changed, dropped]

    def decode_changes(self, changes: list[Any]) -> None:
        changed, dropped = changes
        for number, codes in changed:
            if number in self.shared:  # else this side dropped it at the same time
                self.refill(number, codes)
        for number in dropped:
            self.forget(number)


def count_references(shared: SharedContainer) -> int:
    """Counts references to a container, to compare with one that nothing else references."""
    return sys.getrefcount(shared.container)
