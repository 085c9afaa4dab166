"""What a program may send to its grader by name, from Python's standard library."""

from __future__ import annotations

import builtins
import importlib
import sys

from grpo.verifiers.serialization import CONTAINERS, IMMUTABLE_TYPES

TYPE_CHECKING = False  # see confine.py
if TYPE_CHECKING:
    from typing import Any

# Classes that only hold a value. Functions are never sent by name: `eval` or `pickle.loads` would
# run in the grader what the program wrote.
SHARED_CLASSES = {
    *((kind.__module__, kind.__qualname__) for kind in (*CONTAINERS, object, int, float, str)),
    ("builtins", "bool"),
    *IMMUTABLE_TYPES,
}
EXCEPTION_MODULES = {
    *("builtins", "json.decoder", "decimal", "dataclasses", "statistics", "_queue", "queue"),
    *("asyncio.exceptions", "struct", "binascii", "zlib", "_csv", "configparser", "re", "copy"),
    *("sre_constants", "re._constants", "concurrent.futures._base"),
}
# A test's `except` catches its own failed assert by these, so the program can't send them by name.
CATCH_ALL_EXCEPTIONS = {
    ("builtins", "BaseException"),
    ("builtins", "Exception"),
    ("builtins", "AssertionError"),
}
# Modules that tests get if the program imports them. None runs a text or opens a file.
SHARED_MODULES = {
    *("math", "cmath", "string", "itertools", "functools", "collections", "collections.abc"),
    *("heapq", "bisect", "random", "statistics", "fractions", "decimal", "datetime", "re", "json"),
    *("copy", "typing", "time"),
}


def list_streams() -> dict[str, tuple[Any, Any]]:
    """Returns where each stream, `input` and `print` is, and its usual value.

    Tests replace these to read what a program prints, or to give it input. Meanwhile, the program's
    process has a proxy for the replacement.
    """
    places = {"stdin": sys, "stdout": sys, "stderr": sys, "input": builtins, "print": builtins}
    return {name: (place, getattr(place, name)) for name, place in places.items()}


def find_class(value: Any) -> tuple[str, str] | None:
    """Returns module and name of a class that can be sent by name; None for other values."""
    if not isinstance(value, type):
        return None
    place = (value.__module__, value.__qualname__)
    known = place in SHARED_CLASSES or (
        place[0] in EXCEPTION_MODULES and issubclass(value, BaseException)
    )
    found = getattr(sys.modules.get(place[0]), place[1], None)
    return place if known and found is value else None


def import_class(module: Any, name: Any) -> type:
    """Returns the class with this module and name.

    Raises:
        Exception: of any type, if it is not a class that can be sent by name.
    """
    if (module, name) in SHARED_CLASSES:
        found = getattr(importlib.import_module(module), name)
    elif module in EXCEPTION_MODULES:
        found = getattr(importlib.import_module(module), name)
        if not issubclass(found, BaseException):
            raise TypeError("not an exception")
    else:
        raise TypeError("not known")
    assert isinstance(found, type)
    return found


def find_import(name: str, value: Any) -> tuple[str, str] | None:
    """Returns the shared module, and the name in it, that `name` was imported from, or None."""
    if isinstance(value, type(sys)):
        return (value.__name__, "") if value.__name__ in SHARED_MODULES else None
    for module in sorted(SHARED_MODULES & set(sys.modules)):
        if may_import(module, name) and getattr(sys.modules[module], name, None) is value:
            return (module, name)
    return None


def may_import(module: Any, name: Any) -> bool:
    if module not in SHARED_MODULES or name.startswith("_"):
        return False
    # `typing.get_type_hints` runs texts.
    return bool(module != "typing" or name == "" or name[0].isupper())


def import_again(module: Any, name: Any) -> Any:
    """Imports what `find_import` returned, from this process's own standard library.

    Raises:
        Exception: of any type, if it is not from a shared module.
    """
    if not may_import(module, name):
        raise TypeError("not known")
    found: Any = importlib.import_module(module)
    if name:
        found = getattr(found, name)
        if isinstance(found, type(sys)):
            raise TypeError("not known")
    return found


def find_in_library(value: Any) -> tuple[str, str] | None:
    """Returns module and name of a standard class or function; a program may use all of them."""
    owner = getattr(value, "__objclass__", None) or getattr(value, "__self__", None)
    module = owner.__module__ if isinstance(owner, type) else getattr(value, "__module__", None)
    name = getattr(value, "__qualname__", None)
    if type(module) is not str or type(name) is not str:
        return None
    if module.partition(".")[0] not in sys.stdlib_module_names:
        return None
    try:
        return (module, name) if import_from_library(module, name) == value else None
    except (ImportError, AttributeError):
        return None


def import_from_library(module: str, name: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found
