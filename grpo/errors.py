"""Errors that a user can do something about: each names the key, the value and what is right."""

MAX_MESSAGE_CHARS = 400  # characters of what another library says


class ConfigError(Exception):
    """The experiment as asked for can't be run; known before anything expensive starts. Exit 2."""


class RunError(Exception):
    """The run had to stop, with what was done so far saved. Exit 1."""


def format_error(error: BaseException) -> str:
    """What an error of another library says, as part of a message of one line."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= MAX_MESSAGE_CHARS else f"{said[:MAX_MESSAGE_CHARS]}…"
