"""Errors that a user can do something about: each names the key, the value and what is right."""

MOST_SAID = 400  # characters of what another library says


class ConfigError(Exception):
    """The experiment as asked for can't be run; known before anything expensive starts. Exit 2."""


class RunError(Exception):
    """The run had to stop, with what was done so far saved. Exit 1."""


def one_line(error: BaseException) -> str:
    """What an error of another library says, as part of a message of one line."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= MOST_SAID else f"{said[:MOST_SAID]}…"
