"""Ends the command with a line on standard error and an exit code.

  0    done: the work is done; for a sweep, all of its jobs finished
  1    failed: an error after the work began; what was done so far is saved
  2    refused: the command can't be carried out as given; nothing was started
  130  interrupted: stopped by Ctrl-C or SIGTERM; saved, and can be continued

With `--json` (grpo.cli.outcome) the object has the same as `status` and `exit_code`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from grpo.cli.outcome import note_error
from grpo.config.secrets import redact
from grpo.errors import ConfigError, RunError


@contextmanager
def command_errors() -> Iterator[None]:
    """Within it, an error that a user can act on ends the process with a line and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except ConfigError as error:
        refuse(error)
    except RunError as error:
        fail(str(error))
    except BrokenPipeError:  # the reader has closed the pipe, as in `grpo --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def refuse(error: ConfigError) -> NoReturn:
    note_error(error)
    print(f"grpo: {redact(str(error))}", file=sys.stderr)
    raise SystemExit(2)


def fail(message: str) -> NoReturn:
    note_error(message)
    print(f"grpo: {redact(message)}", file=sys.stderr)
    raise SystemExit(1)
