"""Reads the options of the commands that take no overrides."""

from __future__ import annotations

import re
from argparse import ArgumentParser
from typing import NoReturn

from grpo.errors import ConfigError


class CommandParser(ArgumentParser):
    """argparse's parser, whose errors are refusals of one line that begin with the usage."""

    def __init__(self, usage: str) -> None:
        super().__init__("grpo", usage=usage, add_help=False, allow_abbrev=False)

    def add_value(self, name: str, default: str | None = None, needs: str = "a value") -> None:
        """Adds an option with a value that may not be empty. needs: what the refusal asks for."""

        def read(value: str) -> str:
            return value or self.error(f"argument {name}: expected {needs}")

        self.add_argument(name, default=default, type=read, metavar=needs)

    def error(self, message: str) -> NoReturn:
        missing = re.fullmatch(r"argument (\S+): expected (.*)", message)
        if missing is None:
            raise ConfigError(f"{self.usage}: {message}.")
        name = missing[1]
        (needs,) = [action.metavar for action in self._actions if name in action.option_strings]
        raise ConfigError(f"{name} needs {needs}.", key=name)
