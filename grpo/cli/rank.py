"""A process that takes part in a run as one of its ranks; the first rank is the command itself."""

from __future__ import annotations

import logging
import os
import sys
from typing import cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from omegaconf import DictConfig

from grpo.cli.exits import command_errors
from grpo.cli.jobs import prepare_process
from grpo.cli.processes import Job
from grpo.config.secrets import redact_logs, remember_secrets
from grpo.errors import ConfigError, RunError
from grpo.parallel import Ranks
from grpo.parallel.start import STARTED_VARIABLE, join_launched, join_started, leaving


def main() -> None:
    """Joins the run that the first rank describes, and trains with it."""
    from grpo.memory.allocator import keep_freed_memory

    prepare_process()
    keep_freed_memory()
    with command_errors():
        ranks = join_started() if STARTED_VARIABLE in os.environ else join_launched()
    try:
        with leaving(ranks):
            follow(ranks)
    except (ConfigError, RunError, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(130) from None
        # The first rank says what was wrong; if it can't be reached, its end is the reason.
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None


def follow(ranks: Ranks) -> None:
    """Receives the run's job from the first rank, and takes part in it."""
    job = cast(Job, ranks.compute_on_first(wait_for_first))
    os.chdir(job.working_directory)
    sys.path += [path for path in job.import_path if path not in sys.path]
    setup_globals()  # Hydra's resolvers
    HydraConfig.instance().set_config(cast(DictConfig, job.hydra))
    remember_secrets(job.config)
    set_up_logging(ranks)

    if job.command == "eval":
        from grpo.evaluate import evaluate_from_config
        from grpo.locate import find_for_evaluation

        evaluate_from_config(job.config, job.folder, find_for_evaluation(job.config), ranks)
        return
    from grpo.locate import find_for_training
    from grpo.run import follow_training

    follow_training(job.config, job.folder, find_for_training(job.config), ranks)


def wait_for_first() -> object:
    """Stands for the first rank's `describe_job`, which the others don't call."""
    raise AssertionError


def set_up_logging(ranks: Ranks) -> None:
    """Shows warnings of what this rank alone computes; the first rank tells what all do."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter(f"rank {ranks.index}: %(message)s"))
    handler.addFilter(lambda record: getattr(ranks, "is_working", True))
    logging.getLogger().addHandler(handler)
    redact_logs()


if __name__ == "__main__":
    main()
