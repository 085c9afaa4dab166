"""How the command ends: a line on standard error and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from grpo.config.secrets import redact
from grpo.errors import ConfigError, RunError


@contextmanager
def command_errors() -> Iterator[None]:
    """What the user can do something about ends the process with a line and its exit code."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except ConfigError as error:
        refuse(error)
    except RunError as error:
        fail(str(error))
    except BrokenPipeError:  # who read this has heard enough, as in `grpo --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def refuse(error: ConfigError) -> NoReturn:
    print(f"grpo: {redact(str(error))}", file=sys.stderr)
    raise SystemExit(2)


def fail(message: str) -> NoReturn:
    print(f"grpo: {redact(message)}", file=sys.stderr)
    raise SystemExit(1)
