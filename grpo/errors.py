"""Errors that a user can do something about: each names the key, the value and what is right."""


class ConfigError(Exception):
    """The experiment as asked for can't be run; known before anything expensive starts. Exit 2."""


class RunError(Exception):
    """The run had to stop, with what was done so far saved. Exit 1."""
