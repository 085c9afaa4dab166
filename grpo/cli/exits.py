"""How the command ends: a line on standard error and an exit code.

  0    done: the work was done; of a sweep, all of its jobs ended well
  1    failed: it began and could not be ended well; what was done so far is saved
  2    refused: it can't be done as asked, which was known before it began; nothing is left behind
  130  interrupted: by Ctrl-C or SIGTERM, or asked to stop; saved, and can go on

With `--json` (grpo.cli.outcome) the object says the same, as `status` and `exit_code`.
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
    note_error(error)
    print(f"grpo: {redact(str(error))}", file=sys.stderr)
    raise SystemExit(2)


def fail(message: str) -> NoReturn:
    note_error(message)
    print(f"grpo: {redact(message)}", file=sys.stderr)
    raise SystemExit(1)
