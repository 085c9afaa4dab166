"""A reward over HTTP, from a local server that works, is slow, is down or answers nonsense."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote

import pytest

from grpo.errors import ConfigError
from grpo.rewards import Endpoint
from grpo.types import Example, Failure, Sample
from tests.servers import RequestHandler


def build_samples(count: int) -> list[Sample]:
    return [
        Sample(f"p{n}", "x" * n, (1,), False, Example("q", f"a{n}", float, {"row": n}), 0)
        for n in range(count)
    ]


class Server(ThreadingHTTPServer):
    """Behaves as the path says; keeps the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.calls: Counter[str] = Counter()
        self.bodies: list[Any] = []
        self.tokens: list[str | None] = []

    def format_url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{quote(path)}"


class Handler(RequestHandler):
    server: Server

    def do_POST(self) -> None:
        path = unquote(self.path).lstrip("/")
        self.server.calls[path] += 1
        body = json.loads(self.read_body())
        self.server.bodies.append(body)
        self.server.tokens.append(self.headers.get("Authorization"))
        lengths = [len(sample["completion"]) for sample in body["samples"]]
        right = json.dumps({"rewards": lengths}).encode()
        if path == "flaky" and self.server.calls[path] <= 2:
            self.answer(503, b"")
        elif path == "flaky connection" and self.server.calls[path] <= 2:
            self.connection.close()
        elif path == "second batch" and 2 in lengths:
            self.answer(500, b"")
        elif path.isdigit():
            self.answer(int(path), b"no")
        elif path == "slow":
            time.sleep(20)
        elif path == "drip":
            self.drip(right + b" " * 40)
        elif path == "cut":
            self.answer(200, right, {"Content-Length": str(len(right) + 10)})
        else:
            self.answer(200, ANSWERS.get(path, right))

    def drip(self, content: bytes) -> None:
        self.answer(200, b"", {"Content-Length": str(len(content))})
        for byte in content:
            time.sleep(0.2)
            self.wfile.write(bytes([byte]))


# For two samples.
ANSWERS = {
    "null": b'{"rewards": [null, 0.5]}',
    "garbage": b"<html>hello</html>",
    "no text": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "list": b"[1, 2]",
    "other key": b'{"scores": [1, 2]}',
    "few": b'{"rewards": [1]}',
    "many": b'{"rewards": [1, 2, 3]}',
    "text": b'{"rewards": ["1", "2"]}',
    "bool": b'{"rewards": [true, false]}',
    "nan": b'{"rewards": [NaN, 1]}',
    "inf": b'{"rewards": [1e999, 1]}',
    "huge": b'{"rewards": [1' + b"0" * 400 + b", 1]}",
}


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield server
        server.shutdown()


def test_it_sends_what_a_reward_sees_and_takes_numbers_and_nulls(server: Server) -> None:
    assert Endpoint(server.format_url("well"))(build_samples(2)) == [0.0, 1.0]
    assert Endpoint(server.format_url("null"))(build_samples(2)) == [None, 0.5]
    assert server.bodies[0] == {
        "samples": [
            {"prompt": "p0", "completion": "", "answer": "a0", "columns": {"row": 0}},
            {"prompt": "p1", "completion": "x", "answer": "a1", "columns": {"row": 1}},
        ]
    }


def test_batches_come_back_in_order(server: Server) -> None:
    reward = Endpoint(server.format_url("well"), batch_size=3, workers=4)
    assert reward(build_samples(20)) == [float(n) for n in range(20)]
    assert server.calls["well"] == 7
    assert reward([]) == []
    reward.close()
    assert reward(build_samples(1)) == [0.0]  # and starts again
    reward.close()


@pytest.mark.parametrize("path", ["flaky", "flaky connection"])
def test_what_fails_twice_is_asked_a_third_time(server: Server, path: str) -> None:
    start = time.monotonic()
    assert Endpoint(server.format_url(path), retries=2)(build_samples(2)) == [0.0, 1.0]
    assert server.calls.total() == 3
    assert time.monotonic() - start > 0.25 + 0.5  # the shortest possible pauses


@pytest.mark.parametrize(("status", "calls"), [(500, 2), (503, 2), (429, 2), (400, 1), (404, 1)])
def test_only_what_may_pass_is_asked_again(server: Server, status: int, calls: int) -> None:
    values = Endpoint(server.format_url(str(status)), retries=1)(build_samples(2))
    assert [isinstance(value, Failure) for value in values] == [True, True]
    assert f"HTTP {status}" in values[0].reason  # type: ignore[union-attr]
    assert f"(try {calls})" in values[0].reason  # type: ignore[union-attr]
    assert server.calls[str(status)] == calls


@pytest.mark.parametrize("path", [path for path in ANSWERS if path != "null"])
def test_an_answer_of_another_shape_is_a_failure_and_not_asked_again(
    server: Server, path: str
) -> None:
    url = server.format_url(path)
    values = Endpoint(url, retries=3)(build_samples(2))
    assert [isinstance(value, Failure) for value in values] == [True, True]
    assert "not valid" in values[0].reason  # type: ignore[union-attr]
    assert server.calls.total() == 1


@pytest.mark.parametrize(("path", "says"), [("slow", "timed out"), ("drip", "within 1.5 s")])
def test_a_slow_answer_is_a_failure_within_the_limit(server: Server, path: str, says: str) -> None:
    start = time.monotonic()
    (value,) = Endpoint(server.format_url(path), seconds=1.5, retries=0)(build_samples(1))
    assert isinstance(value, Failure)
    assert says in value.reason
    assert time.monotonic() - start < 5  # the whole answer would take 11 or 20


def test_an_answer_that_breaks_off_is_a_failure(server: Server) -> None:
    (value,) = Endpoint(server.format_url("cut"), retries=0)(build_samples(1))
    assert isinstance(value, Failure)
    assert "breaks off" in value.reason


def test_no_server_is_a_failure_of_every_row() -> None:
    with Server() as server:
        url = server.format_url("gone")
    values = Endpoint(url, retries=0)(build_samples(2))
    assert all(isinstance(value, Failure) and "refused" in value.reason for value in values)


def test_a_batch_that_fails_harms_no_other(server: Server) -> None:
    values = Endpoint(server.format_url("second batch"), retries=0, batch_size=2)(build_samples(6))
    assert [isinstance(v, Failure) for v in values] == [False, False, True, True, False, False]
    assert [v for v in values if not isinstance(v, Failure)] == [0.0, 1.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"url": "localhost:8000"}, "url=localhost:8000"),
        ({"url": "file:///etc/passwd"}, "url=file"),
        ({"url": "http://"}, "url=http://"),
        ({"seconds": 0}, "seconds=0"),
        ({"retries": -1}, "retries=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"workers": 0}, "workers=0"),
    ],
)
def test_a_bad_option_is_named_with_its_value(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Endpoint(**{"url": "http://localhost", **options})


def test_a_token_comes_from_the_environment(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUR_TOKEN", "s3cret")
    reward = Endpoint(server.format_url("well"), token_env="OUR_TOKEN")
    assert reward(build_samples(2)) == [0.0, 1.0]
    reward.close()
    plain = Endpoint(server.format_url("well"))
    plain(build_samples(1))
    plain.close()
    assert server.tokens == ["Bearer s3cret", None]
    with pytest.raises(ConfigError, match="token_env=THEIRS"):
        Endpoint(server.format_url("well"), token_env="THEIRS")
    with pytest.raises(ConfigError, match="token_env=NAME"):
        Endpoint("http://me:s3cret@localhost/x")
