"""The two jobs that have a config: training and evaluation."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from grpo.cli.exits import refuse, stop
from grpo.config import schema as config
from grpo.config.check import check, check_training
from grpo.config.overrides import key_of
from grpo.config.secrets import cross_out_in_logs
from grpo.errors import ConfigError, RunError
from grpo.memory.allocator import keep_freed_memory
from grpo.runs import folder as past
from grpo.runs.files import note_failure
from grpo.runs.lock import Occupied, locked
from grpo.runs.stop import ask_to_stop, asked_to_stop, in_sweep, leave_terminal
from grpo.sweep.gpus import take_gpu
from grpo.sweep.launch import NOT_THE_JOB

log = logging.getLogger(__name__)


def prepare() -> None:
    """Once a process: a sweep's jobs may run in processes of their own."""
    config.register()
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a user's own rewards and data sets lie where they work


def train_job(cfg: DictConfig) -> float | None:
    """Trains, and returns the objective that a search maximises."""
    if asked_to_stop():
        return None
    with told() as folder, locked(folder):
        from grpo.locate import find_for_training

        check(cfg)
        check_training(cfg)
        past.check_folder(folder, cfg.resume, cfg.model, cfg.adapter)
        found = find_for_training(cfg)

        from grpo.run import train_from_config

        return train_from_config(cfg, folder, found)
    return None  # stopped before it began


def eval_job(cfg: DictConfig) -> float | None:
    """Evaluates a checkpoint."""
    with told() as folder:
        from grpo.locate import find_for_evaluation

        check(cfg)
        found = find_for_evaluation(cfg)

        from grpo.evaluate import evaluate_from_config

        return evaluate_from_config(cfg, folder, found)


@contextmanager
def told() -> Iterator[Path]:
    """A job's folder; alone, its error ends the process, in a sweep it is the sweep's to report."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    is_job = in_sweep()
    if is_job:
        leave_terminal()
        own = [o for o in hydra_config.overrides.task if key_of(o) not in NOT_THE_JOB]
        say(f"\njob {folder.name}: {' '.join(own)}")
    prepare()
    cross_out_in_logs()
    keep_freed_memory()  # before anything imports torch
    try:
        if is_job and (gpu := take_gpu(folder.parent)):
            say(f"on GPU {gpu}")
        yield folder
    except (ConfigError, RunError) as error:
        if is_job:
            if isinstance(error, Occupied):
                say(str(error))  # and nothing into a folder that is another's
            else:
                note_failure(folder, str(error))
            # Hydra keeps the error to the sweep's end; its frames would keep the job's models.
            raise error.with_traceback(None) from None
        if isinstance(error, ConfigError):
            past.forget_unstarted(folder)
            refuse(error)
        stop(str(error))
    except KeyboardInterrupt:
        if not is_job:
            raise
        ask_to_stop()  # nothing is lost: its training had not begun
    except Exception as error:
        if not is_job:
            raise
        # A fault, which ends this job and none of the others; it may have to cross to a process.
        log.exception("job %s failed", folder.name)
        reason = f"{type(error).__name__}: {error}"
        note_failure(folder, reason)
        raise RunError(reason) from None


def say(line: str) -> None:
    """Its end goes with it: jobs beside this one write into the same output."""
    print(f"{line}\n", end="", flush=True)
