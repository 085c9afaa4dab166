"""A WSGI app behind an ASGI address, for requests without a body. Starlette's own is deprecated."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable
from typing import Any

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

WSGI = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class WSGIApp:
    """Answers GET and HEAD by a WSGI app, in a thread, each answer at once."""

    def __init__(self, app: WSGI) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await to_thread.run_sync(self.respond, build_environ(Request(scope)))
        await response(scope, receive, send)

    def respond(self, environ: dict[str, Any]) -> Response:
        started: list[tuple[str, list[tuple[str, str]]]] = []

        def start(status: str, headers: list[tuple[str, str]], exc_info: object = None) -> None:
            started.append((status, headers))

        chunks = self.app(environ, start)
        try:
            body = b"".join(chunks)
        finally:
            if hasattr(chunks, "close"):
                chunks.close()
        status, headers = started[-1]
        response = Response(body, int(status.partition(" ")[0]))
        response.raw_headers = [(k.lower().encode(), v.encode("latin1")) for k, v in headers]
        return response


def build_environ(request: Request) -> dict[str, Any]:
    """Builds the environment that PEP 3333 specifies, for a request without a body."""
    scope = request.scope
    root = str(scope.get("root_path", ""))
    host, port = scope.get("server") or ("localhost", 80)
    return {
        **{f"HTTP_{k.upper().replace('-', '_')}": v for k, v in request.headers.items()},
        "REQUEST_METHOD": request.method,
        "SCRIPT_NAME": root,
        "PATH_INFO": str(scope["path"]).removeprefix(root).encode().decode("latin1"),
        "QUERY_STRING": scope["query_string"].decode("ascii"),
        "SERVER_PROTOCOL": f"HTTP/{scope['http_version']}",
        "SERVER_NAME": host,
        "SERVER_PORT": str(port),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scope.get("scheme", "http"),
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }
