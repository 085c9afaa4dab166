"""`grpo dashboard [FOLDER]`: serves the pages of a folder of outputs until Ctrl-C."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

from grpo.commands.arguments import CommandParser
from grpo.config.extras import require_extra
from grpo.errors import ConfigError

USAGE = "grpo dashboard [FOLDER] [--host HOST] [--port PORT]"
DEFAULT_FOLDER, DEFAULT_HOST, DEFAULT_PORT = "outputs", "127.0.0.1", "8265"


def dashboard(arguments: Sequence[str]) -> None:
    """Serves runs, sweeps and studies at one address.

    Raises:
        ConfigError: there is no such folder, or the address can't be used.
    """
    parser = CommandParser(USAGE)
    parser.add_argument("folder", nargs="?", default=DEFAULT_FOLDER)
    parser.add_value("--host", DEFAULT_HOST)
    parser.add_value("--port", DEFAULT_PORT)
    options = parser.parse_args(arguments)
    root, host = Path(options.folder).expanduser(), options.host
    if not root.is_dir():
        raise ConfigError(f"{root}: there is no such folder; runs make it, or name another one.")
    for package in ("uvicorn", "starlette", "trackio", "optuna_dashboard"):
        require_extra("grpo dashboard", package, "dashboard")
    listener = open_listener(host, options.port)
    import uvicorn

    from grpo.dashboard.app import LOOPBACK, build_app

    app = build_app(root, host)
    place = f"[{host}]" if ":" in host else host
    if host not in LOOPBACK:
        print(f"whoever reaches {host} can read what is in {root}", flush=True)
    print(
        f"dashboard of {root}: http://{place}:{listener.getsockname()[1]}/ (Ctrl-C ends it)",
        flush=True,
    )
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def open_listener(host: str, port: str) -> socket.socket:
    """Opens a socket that listens at an address; port 0 is any free port."""
    if not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"--port {port}: a number up to 65535, or 0 for any that is free.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, int(port)), family=family)
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: can't listen there ({error.strerror}); "
            f"another dashboard may; --port 0 takes any port that is free."
        ) from error
