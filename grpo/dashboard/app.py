"""The pages at one address: home, reports, Trackio and optuna-dashboard.

No request changes a run, a sweep, a study or a logged value. Trackio opens its database to write:
when its pages are first requested, it converts the files in outputs/trackio to its current format.
"""

from __future__ import annotations

import os
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

from grpo.dashboard.home import render_home
from grpo.dashboard.outputs import find_outputs
from grpo.dashboard.studies import Studies
from grpo.dashboard.wsgi import WSGIApp
from grpo.errors import ConfigError
from grpo.report.run.page import render_run_page
from grpo.report.run.read import read_run
from grpo.report.sweep.write import render_sweep_page

TRACKIO_READING = ("get_", "list_", "query_project")  # how the names of such functions begin
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def build_app(root: Path, host: str) -> Starlette:
    """Builds the app that serves all pages of a folder of outputs.

    host: where it listens; on a loopback address the app answers only to this machine's names.
    """
    root = root.absolute()
    studies = Studies(root)

    def home(request: Request) -> Response:
        outputs = find_outputs(root)
        studies.copy_studies(outputs.sweeps)
        return HTMLResponse(render_home(outputs, root, studies.ids, studies.unreadable))

    pages = ReportCache()

    def run(request: Request) -> Response:
        sources = ["metrics.jsonl", "summary.json"]
        return pages.serve_report(
            find_requested_folder(root, request),
            sources,
            lambda run: render_run_page(read_run(run)),
        )

    def sweep(request: Request) -> Response:
        sources = ["sweep.json", "*/summary.json", "*/metrics.jsonl"]
        return pages.serve_report(find_requested_folder(root, request), sources, render_sweep_page)

    trackio = ReadOnlyApp(LazyApp(lambda: build_trackio_app(root / "trackio")), is_trackio_reading)
    routes = [
        Route("/", home),
        Route("/run/{path:path}", run),
        Route("/sweep/{path:path}", sweep),
        Mount("/trackio", trackio),
        Route("/static/trackio/{rest:path}", trackio),  # its page requests it from the root
        Route("/file", trackio),
        Mount("/", ReadOnlyApp(LazyApp(lambda: build_optuna_app(studies)))),
    ]
    # Against DNS rebinding: another site's page must not read this one by a name that points here.
    names = [*LOOPBACK, "[::1]"] if host in LOOPBACK else ["*"]
    return Starlette(
        routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=names)]
    )


def find_requested_folder(root: Path, request: Request) -> Path:
    """Returns the folder that a request names; raises HTTPException, 404, if it is not in root."""
    folder = root / str(request.path_params["path"])
    if not folder.resolve().is_relative_to(root.resolve()) or not folder.is_dir():
        raise HTTPException(404, "There is no such folder.")
    return folder


class ReportCache:
    """Serves reports that are up to date: written ones, or else ones that it makes and caches."""

    def __init__(self, max_reports: int = 16) -> None:
        self.max_reports = max_reports
        self.rendered: OrderedDict[Path, tuple[float, str]] = OrderedDict()
        self.locks: defaultdict[Path, Lock] = defaultdict(Lock)

    def serve_report(
        self, folder: Path, sources: list[str], make: Callable[[Path], str]
    ) -> Response:
        """Returns a folder's report; makes it again if its sources are newer.

        Raises:
            HTTPException: 404, there is nothing to show yet.
        """
        report = folder / "report.html"
        times = [file.stat().st_mtime for pattern in sources for file in folder.glob(pattern)]
        newest = max(times, default=0.0)
        if report.is_file() and report.stat().st_mtime >= newest:
            return FileResponse(report)
        with self.locks[folder]:  # other requests for it wait, and get the same
            cached = self.rendered.get(folder)
            if cached is None or cached[0] != newest:
                try:
                    cached = newest, make(folder)
                except ConfigError as error:
                    raise HTTPException(404, str(error)) from error
                self.rendered[folder] = cached
                while len(self.rendered) > self.max_reports:
                    self.rendered.popitem(last=False)
        return HTMLResponse(cached[1])


class LazyApp:
    """An app that is made at its first request, since its import is slow."""

    def __init__(self, make: Callable[[], ASGIApp]) -> None:
        self.make = make
        self.app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is None:
            self.app = await to_thread.run_sync(self.make)
        await self.app(scope, receive, send)


class ReadOnlyApp:
    """Refuses requests that could change what is shown.

    Args:
        reads: whether a request by another method than GET and HEAD only reads; None: none does.
    """

    def __init__(self, app: ASGIApp, reads: Callable[[Scope], bool] | None = None) -> None:
        self.app, self.reads = app, reads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = scope["type"] == "http" and scope["method"] not in ("GET", "HEAD")
        if writing and not (self.reads and self.reads(scope)):
            await Response("This dashboard is read-only.", 405)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def is_trackio_reading(scope: Scope) -> bool:
    """Returns whether a request calls a reading function of Trackio's; its page uses POST."""
    called = str(scope["path"]).rpartition("/api/")[2]
    return scope["method"] == "POST" and called.startswith(TRACKIO_READING)


def build_trackio_app(folder: Path) -> ASGIApp:
    """Builds Trackio's own app."""
    os.environ["TRACKIO_DIR"] = str(folder)  # read when it is imported
    from trackio.server import build_starlette_app_only

    app: ASGIApp
    app, _ = build_starlette_app_only()
    return app


def build_optuna_app(studies: Studies) -> ASGIApp:
    from optuna_dashboard import wsgi

    app = wsgi(studies.storage)

    def refreshed(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        studies.refresh()
        answer: Iterable[bytes] = app(environ, start)
        return answer

    return WSGIApp(refreshed)
