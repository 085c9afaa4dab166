"""Packages that only some choices need: each is brought by an extra of this package."""

from __future__ import annotations

from importlib.util import find_spec

from grpo.errors import ConfigError


def require_extra(choice: str, package: str, extra: str) -> None:
    """Refuses a choice whose package is not installed.

    Args:
        choice: as the user gave it: adapter=qlora
        package: as it is imported.

    Raises:
        ConfigError: naming the extra that brings it.
    """
    if find_spec(package) is None:
        raise ConfigError(
            f"{choice}: needs {package}, which is not installed: pip install 'grpo-bench[{extra}]'"
        )
