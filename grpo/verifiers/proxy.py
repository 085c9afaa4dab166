"""Proxies for what can't be sent by value between a program and its grader.

What is not plain data stays where it was made: functions, classes, instances, iterators. The other
side gets a proxy, of a class with the same name, bases and operators, which asks this side for
every operation. A proxy that comes back becomes the original object again.
"""

from __future__ import annotations

import json
import types

from grpo.verifiers.channel import Channel
from grpo.verifiers.operations import (
    BINARY,
    COMPARISONS,
    READABLE_ATTRIBUTES,
    SPECIAL,
    UNARY,
    VALUE_TYPES,
    make_doc,
    make_error,
    make_method,
    make_root,
)
from grpo.verifiers.serialization import CONTAINER_NAMES, CONTAINERS, MAX_DEPTH, ValueCodec
from grpo.verifiers.standard_library import find_class, import_class

TYPE_CHECKING = False  # see confine.py
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

PLAIN_HASHES = {None, object.__hash__, *(kind.__hash__ for kind in VALUE_TYPES)}


class Peer(ValueCodec):
    """One of the two processes: the objects that it exported, and the proxies that it got.

    Args:
        first_number: 0 on one side and 1 on the other, see `ValueCodec`.
        incoming: descriptor of the pipe to read.
        outgoing: descriptor of the pipe to write.
        asks_first: whether this side may ask when it is not answering a question.
    """

    def __init__(self, first_number: int, incoming: int, outgoing: int, asks_first: bool) -> None:
        super().__init__(first_number)
        self.exported: dict[int, Any] = {}  # objects with a proxy on the other side, by number
        self.exported_numbers: dict[int, int] = {}  # by id
        # The proxies here, by number; kept, so that their ids stay.
        self.proxies: dict[int, Any] = {}
        self.proxy_numbers: dict[int, int] = {}
        self.handles: list[Any] = []  # kept for the same reason
        self.hashes: dict[int, int] = {}  # hashes of the proxies whose class defines one, by id
        self.container_bases: dict[type, type] = {}  # proxy class -> the container it derives from
        self.building_class = False
        self.metaclass, self.root = make_root(self)
        self.channel = Channel(
            incoming, outgoing, self.pack, self.unpack, self.serve, asks_first=asks_first
        )

    # What each side decides for itself: what it serves, what it sends by name, what proxies may do

    def serve(self, operation: str, operands: tuple[Any, ...], options: dict[str, Any]) -> Any:
        raise NotImplementedError

    def find_name(self, value: Any) -> tuple[str, str] | None:
        """Returns module and name of a value from the standard library that both sides have."""
        raise NotImplementedError

    def import_name(self, module: str, name: str) -> Any:
        raise NotImplementedError

    def check_shareable(self, value: Any) -> None:
        """Raises TypeError if the other side must not get a proxy for a value."""

    def ask(self, operation: str, *operands: Any, **options: Any) -> Any:
        return self.channel.ask(operation, *operands, **options)

    def read(self, owner: Any, name: str) -> Any:
        """Returns an attribute of a proxy."""
        if name.startswith("__") and name.endswith("__") and name not in READABLE_ATTRIBUTES:
            raise AttributeError(name)
        return self.ask("getattr", owner, name)

    def operate(self, operation: str, *operands: Any) -> Any:
        return self.ask(operation, *operands)

    def compare(self, operation: str, one: Any, other: Any) -> Any:
        # Both are in one set or dict, where the other side compared them.
        if self.channel.is_busy():
            return (one is other) == (operation == "eq")
        return self.ask(operation, one, other)

    def contains(self, container: Any, item: Any) -> Any:
        return self.ask("contains", container, item)

    def is_proxy(self, value: Any) -> bool:
        return id(value) in self.proxy_numbers

    # Messages

    def pack(self, kind: str, content: Any) -> bytes:
        self.undo.clear()
        try:
            changes, extra = self.encode_changes(), self.encode(self.collect_extra())
            message = json.dumps([kind, changes, extra, self.encode(content)]).encode()
        except BaseException:
            for take_back in reversed(self.undo):
                take_back()
            raise
        for number in changes[1]:
            self.forget(number)
        return message

    def unpack(self, message: bytes) -> tuple[str, Any]:
        kind, changes, extra, content = json.loads(message)
        self.decode_changes(changes)
        self.apply_extra(self.decode(extra))
        return kind, self.decode(content)

    def collect_extra(self) -> Any:
        """Returns what else a message must tell the other side."""
        return None

    def apply_extra(self, extra: Any) -> None:
        pass

    # Sending objects

    def encode_object(self, value: Any, depth: int) -> Any:
        if id(value) in self.proxy_numbers:
            return ["yours", self.proxy_numbers[id(value)]]
        named = self.find_name(value)
        if named:
            return ["named", *named]
        if id(value) in self.exported_numbers:
            return ["mine", self.exported_numbers[id(value)]]
        kind = type(value)
        if isinstance(value, BaseException):
            if self.find_kind(kind):
                return ["error", self.encode_kind(kind, depth), self.encode(value.args, depth + 1)]
            value.__traceback__ = None  # its frames would keep their local variables alive
        self.check_shareable(value)
        if isinstance(value, type):
            return self.encode_class(value, depth)
        number = self.export(value)
        if kind is types.CoroutineType or kind is types.GeneratorType:
            return [kind.__name__, number]
        return [
            "object",
            number,
            self.encode_kind(kind, depth),
            *self.describe_object(value, depth),
        ]

    def export(self, value: Any) -> int:
        number = self.take_number()
        self.exported[number], self.exported_numbers[id(value)] = value, number
        self.undo.append(lambda: self.exported_numbers.pop(id(self.exported.pop(number))))
        return number

    def encode_kind(self, kind: type, depth: int) -> Any:
        """Encodes the class of an object or of a base; describes it unless both sides have it."""
        named = self.find_kind(kind)
        if named:
            return ["named", *named]
        for known, numbers in ("yours", self.proxy_numbers), ("mine", self.exported_numbers):
            if id(kind) in numbers:
                return [known, numbers[id(kind)]]
        return self.encode_class(kind, depth + 1)

    def find_kind(self, kind: type) -> tuple[str, str] | None:
        """Returns module and name of a class that both sides can instantiate and derive from."""
        plain = kind is object or kind in VALUE_TYPES or kind in CONTAINERS
        return find_class(kind) if plain or issubclass(kind, BaseException) else None

    def decode_kind(self, code: Any) -> Any:
        return import_class(*code[1:]) if code[0] == "named" else self.decode(code)

    def encode_class(self, value: type, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise RecursionError("too many classes within each other")
        return ["class", self.export(value), *self.describe_class(value, depth)]

    def describe_class(self, value: type, depth: int) -> list[Any]:
        attributes = dict(vars(value))
        for base in value.__bases__:
            if base in CONTAINERS:
                attributes = {**vars(base), **attributes}
        known = {*UNARY, *BINARY, *COMPARISONS, *SPECIAL}
        return [
            value.__name__,
            value.__doc__ if type(value.__doc__) is str else None,
            [self.encode_kind(base, depth) for base in value.__bases__],
            [name for name in attributes if name in known and attributes[name] is not None],
            [name for name in attributes if name in known and attributes[name] is None],
            next((base.__name__ for base in value.__mro__ if base in CONTAINERS), None),
        ]

    def describe_object(self, value: Any, depth: int) -> list[Any]:
        """Returns what never changes about an object: its value or arguments, and its hash."""
        kind = type(value)
        if isinstance(value, BaseException):
            base: Any = value.args
        else:
            base = next((VALUE_TYPES[b](value) for b in kind.__mro__ if b in VALUE_TYPES), None)
        hashed = None
        if kind.__hash__ not in PLAIN_HASHES:
            try:
                hashed = hash(value)
            except Exception:  # noqa: BLE001 - an object whose hash raises has no hash
                hashed = None
        return [self.encode(base, depth + 1), self.encode(hashed)]

    # Receiving objects

    def decode_object(self, name: str, parts: list[Any]) -> Any:
        if name == "yours":
            return self.exported[parts[0]]
        if name == "mine":
            return self.proxies[parts[0]]
        if name == "named":
            return self.import_name(*parts)
        if name == "error":
            return make_error(self.decode_kind(parts[0]), self.decode(parts[1]))
        number, *rest = parts
        if type(number) is not int or number in self.proxies:
            raise ValueError("an object needs a new number")
        if name == "object":
            proxy = self.make_object(self.decode_kind(rest[0]), *map(self.decode, rest[1:]))
        elif name == "class":
            proxy = self.make_class(*rest)
        else:
            handle: Any = object.__new__(self.root)
            self.proxy_numbers[id(handle)] = number
            self.handles.append(handle)
            proxy = (self.relay_generator if name == "generator" else self.relay_coroutine)(handle)
        self.proxies[number], self.proxy_numbers[id(proxy)] = proxy, number
        return proxy

    def make_object(self, kind: Any, base: Any, hashed: Any) -> Any:
        if not isinstance(kind, self.metaclass):
            kind = self.root
        if issubclass(kind, BaseException):
            proxy: Any = kind.__new__(kind, *base)
            proxy.args = base
        elif base is None:
            proxy = object.__new__(kind)
        else:
            proxy = next(b for b in kind.__mro__ if b in VALUE_TYPES).__new__(kind, base)
        if type(hashed) is int:
            self.hashes[id(proxy)] = hashed
        return proxy

    def make_class(
        self, name: str, doc: Any, bases: Any, has: Any, lacks: Any, container: Any
    ) -> type:
        local = []
        for base in map(self.decode_kind, bases):
            is_proxy_class = isinstance(base, self.metaclass) and base is not self.root
            if is_proxy_class or base in VALUE_TYPES or issubclass(base, BaseException):
                local.append(base)
        space: dict[str, Any] = {"__slots__": (), "__module__": "answer"}
        space["__doc__"] = make_doc(self, doc)
        space |= {method: make_method(self, method) for method in has}
        space |= {method: None for method in lacks if method in SPECIAL or method in UNARY}
        if any(issubclass(base, BaseException) for base in local):
            # Python itself sets an exception's traceback and context, on the proxy only.
            space["__setattr__"] = BaseException.__setattr__
            space["__delattr__"] = BaseException.__delattr__
        self.building_class = True
        try:
            proxy_class: type = self.metaclass(name, (*local, self.root), space)
        finally:
            self.building_class = False
        if container is not None:
            self.container_bases[proxy_class] = CONTAINER_NAMES[container]
        return proxy_class

    def relay_generator(self, handle: Any) -> Generator[Any, Any, Any]:
        """Relays a generator of the other side, since a test may check that it is a generator."""
        operation, argument = "send", None
        while True:
            try:
                value = self.ask(operation, handle, argument)
            except StopIteration as stop:
                return stop.value
            try:
                operation, argument = "send", (yield value)
            except BaseException as error:  # noqa: BLE001 - the other side gets GeneratorExit, too
                operation, argument = "throw", error

    async def relay_coroutine(self, handle: Any) -> Any:
        """Relays a coroutine of the other side, which runs there from start to end."""
        return self.ask("run", handle)
