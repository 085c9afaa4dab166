"""The packages that only some choices need; an extra of this package installs each."""

from __future__ import annotations

from importlib.util import find_spec

from grpo.errors import ConfigError


def require_extra(choice: str, package: str, extra: str) -> None:
    """Refuses a choice whose package is not installed.

    Args:
        choice: as on the command line: adapter=qlora
        package: its name in an import.

    Raises:
        ConfigError: names the extra that installs it.
    """
    if find_spec(package) is None:
        raise ConfigError(
            f"{choice}: needs {package}, which is not installed: pip install 'grpo-bench[{extra}]'"
        )
