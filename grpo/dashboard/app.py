"""The pages behind one address: home, reports, Trackio, optuna-dashboard. All of it only reads."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Lock
from typing import Any

from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from grpo.dashboard.found import outputs_in
from grpo.dashboard.home import home
from grpo.dashboard.studies import Studies
from grpo.errors import ConfigError
from grpo.report.run.page import run_page
from grpo.report.run.read import read_run
from grpo.report.sweep.write import sweep_page

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def dashboard_app(root: Path, host: str) -> Starlette:
    """host: where it listens; on a loopback address it answers to this machine's names alone."""
    root = root.absolute()
    studies = Studies(root)

    def front(request: Request) -> Response:
        outputs = outputs_in(root)
        studies.follow(outputs.sweeps)
        return HTMLResponse(home(outputs, root, studies.ids, studies.unreadable))

    pages = Pages()

    def run(request: Request) -> Response:
        sources = ["metrics.jsonl", "summary.json"]
        return pages.show(folder_of(root, request), sources, lambda run: run_page(read_run(run)))

    def sweep(request: Request) -> Response:
        sources = ["sweep.json", "*/summary.json", "*/metrics.jsonl"]
        return pages.show(folder_of(root, request), sources, sweep_page)

    runs = Late(lambda: trackio(root / "trackio"))
    routes = [
        Route("/", front),
        Route("/run/{path:path}", run),
        Route("/sweep/{path:path}", sweep),
        Mount("/trackio", runs),
        Route("/static/trackio/{rest:path}", runs),  # which its page asks for from the root
        Route("/file", runs),
        Mount("/", ReadOnly(Late(lambda: optuna(studies)))),
    ]
    # Another site's page must not read this one by a name that it lets point here.
    names = [*LOOPBACK, "[::1]"] if host in LOOPBACK else ["*"]
    return Starlette(
        routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=names)]
    )


def folder_of(root: Path, request: Request) -> Path:
    """The folder that a request names, which must be in the one that is shown."""
    folder = root / str(request.path_params["path"])
    if not folder.resolve().is_relative_to(root.resolve()) or not folder.is_dir():
        raise HTTPException(404, "There is no such folder.")
    return folder


class Pages:
    """Reports as they are now: those that were written, or made and kept here; none is written."""

    def __init__(self, most: int = 16) -> None:
        self.most = most
        self.made: OrderedDict[Path, tuple[float, str]] = OrderedDict()
        self.locks: defaultdict[Path, Lock] = defaultdict(Lock)

    def show(self, folder: Path, sources: list[str], make: Callable[[Path], str]) -> Response:
        """A folder's report, made anew where what it is made from is newer.

        Raises:
            HTTPException: 404, there is nothing to show yet.
        """
        report = folder / "report.html"
        times = [file.stat().st_mtime for own in sources for file in folder.glob(own)]
        newest = max(times, default=0.0)
        if report.is_file() and report.stat().st_mtime >= newest:
            return FileResponse(report)
        with self.locks[folder]:  # others who ask for it wait, and get the same
            made = self.made.get(folder)
            if made is None or made[0] != newest:
                try:
                    made = newest, make(folder)
                except ConfigError as error:
                    raise HTTPException(404, str(error)) from error
                self.made[folder] = made
                while len(self.made) > self.most:
                    self.made.popitem(last=False)
        return HTMLResponse(made[1])


class Late:
    """An app that is made when it is first asked for: they are slow to import."""

    def __init__(self, make: Callable[[], ASGIApp]) -> None:
        self.make = make
        self.app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is None:
            self.app = await to_thread.run_sync(self.make)
        await self.app(scope, receive, send)


class ReadOnly:
    """Lets nothing through that could change a study."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD"):
            await Response("This dashboard only shows.", 405)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def trackio(folder: Path) -> ASGIApp:
    """Trackio's own app, which asks for a token before it changes anything."""
    os.environ["TRACKIO_DIR"] = str(folder)  # read when it is imported
    from trackio.server import build_starlette_app_only

    app: ASGIApp
    app, _ = build_starlette_app_only()
    return app


def optuna(studies: Studies) -> ASGIApp:
    from optuna_dashboard import wsgi

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from starlette.middleware.wsgi import WSGIMiddleware

    shown = wsgi(studies.storage)

    def current(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        studies.look()
        answer: Iterable[bytes] = shown(environ, start)
        return answer

    return WSGIMiddleware(current)
