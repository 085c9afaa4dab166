"""Checks of a reward's options; the caller puts the reward's key before the message."""

from __future__ import annotations

from grpo.errors import ConfigError


def require_at_least(least: int, **options: int) -> None:
    """Raises ConfigError for the first option below `least`."""
    for option, value in options.items():
        if value < least:
            raise ConfigError(f"{option}={value}: must be {least} or more.")


def require_positive(**options: float) -> None:
    """Raises ConfigError for the first option that is not above 0."""
    for option, value in options.items():
        if not value > 0:
            raise ConfigError(f"{option}={value}: must be more than 0.")
