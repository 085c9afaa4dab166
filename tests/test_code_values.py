"""Plain data between a program and its grader: any value comes back equal, and no code runs."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.verifiers.serialization import ValueCodec

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.complex_numbers()
    | st.text() | st.binary() | st.dates() | st.times() | st.timedeltas() | st.fractions()
    | st.decimals(allow_nan=False) | st.integers(-(10**400), 10**400)
    | st.datetimes(timezones=st.none() | st.just(timezone(timedelta(hours=2))))
).filter(lambda value: value == value)  # fmt: skip
HASHABLE = st.recursive(
    SCALARS, lambda some: st.tuples(some, some) | st.frozensets(some, max_size=3), max_leaves=5
)
DATA = st.recursive(
    HASHABLE | st.binary().map(bytearray) | st.builds(range, st.integers(-9, 9), st.integers(0, 9)),
    lambda some: (
        st.lists(some)
        | st.tuples(some)
        | st.sets(HASHABLE)
        | st.dictionaries(HASHABLE, some)
        | st.dictionaries(HASHABLE, some).map(OrderedDict)
        | st.lists(HASHABLE).map(Counter)
        | st.lists(some).map(lambda values: deque(values, maxlen=9))
    ),
    max_leaves=20,
)


def send(sender: ValueCodec, receiver: ValueCodec, value: Any) -> Any:
    changes, code = json.loads(json.dumps([sender.encode_changes(), sender.encode(value)]))
    for number in changes[1]:
        sender.forget(number)
    receiver.decode_changes(changes)
    return receiver.decode(code)


@given(DATA)
def test_plain_data_come_back_as_they_were(value: Any) -> None:
    sender, receiver = ValueCodec(0), ValueCodec(1)
    received = send(sender, receiver, value)
    assert received == value
    assert repr(received) == repr(value) or "set" in repr(value)
    assert send(receiver, sender, received) == value


def test_a_container_is_the_same_on_both_sides_while_both_hold_it() -> None:
    sender, receiver = ValueCodec(0), ValueCodec(1)
    rows: list[Any] = [[1], [2]]
    received = send(sender, receiver, rows)
    received[0].append(3)
    received.append(received)
    assert send(receiver, sender, received) is rows
    assert rows[0] == [1, 3]
    assert rows[2] is rows
    rows.clear()
    send(sender, receiver, None)
    assert received == []


def test_what_one_side_holds_no_more_is_forgotten_by_both() -> None:
    sender, receiver = ValueCodec(0), ValueCodec(1)
    rows: list[Any] = [[1], [2]]
    received = send(sender, receiver, rows)
    del rows
    for _ in range(3):  # the list, then its element
        send(sender, receiver, None)
    assert sender.shared == receiver.shared == {}
    assert received == [[1], [2]]


def test_a_default_that_a_dict_makes_comes_along() -> None:
    class Named(ValueCodec):
        def encode_object(self, value: Any, depth: int) -> Any:
            return ["class"]

        def decode_object(self, name: str, parts: list[Any]) -> Any:
            return int

    received = send(Named(0), Named(1), defaultdict(int, a=1))
    assert received == {"a": 1}
    assert received["b"] == 0


@pytest.mark.parametrize(
    "code",
    [
        *({}, [], [[]], ["list"], ["list", "0", []], ["list", 0, 5], ["dict", 0, [1]], ["int", 5]),
        *(["set", 0, [["list", 1, []]]], ["shared", 7], ["eval", "1"], ["bytes", "x"]),
        *(
            ["Decimal", "x"],
            ["date", 1],
            ["deque", 0, "x", []],
            ["os.system", "true"],
            ["range", "a"],
        ),
    ],
    ids=str,
)
def test_what_is_no_value_raises(code: Any) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 - of any kind: the process leaves then
        ValueCodec(0).decode(code)
