"""The two jobs that have a config: training and evaluation."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from grpo.cli.exits import fail, refuse
from grpo.cli.processes import count_processes, describe_job
from grpo.config import schema
from grpo.config.check import check_config, check_training
from grpo.config.check_parallel import check_enough_prompts
from grpo.config.overrides import parse_key
from grpo.config.secrets import redact_logs, remember_secrets
from grpo.errors import ConfigError, RunError
from grpo.parallel.start import count_launched, join_ranks
from grpo.runs.files import note_failure
from grpo.runs.folder import check_run_folder, remove_unstarted
from grpo.runs.lock import RunLocked, locked
from grpo.runs.stop import is_stop_requested, is_sweep_job, leave_terminal, request_stop

log = logging.getLogger(__name__)


def prepare_process() -> None:
    """Prepares a process, once; the jobs of a sweep may have processes of their own."""
    schema.register_schema()
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a user's own rewards and data sets lie where they work


def train_job(cfg: DictConfig) -> float | None:
    """Trains, and returns the objective that a search compares."""
    if is_stop_requested():
        return None
    with job_errors(cfg) as folder, locked(folder):
        from grpo.locate import find_for_training

        remember_secrets(cfg)
        check_config(cfg)
        check_training(cfg)
        processes = count_processes(cfg)
        check_enough_prompts(cfg, processes or count_launched())
        check_run_folder(folder, cfg.resume, cfg.model, cfg.adapter)
        found = find_for_training(cfg)

        with join_ranks(processes) as ranks:
            from grpo.run import train_from_config

            # The others wait for it.
            ranks.compute_on_first(lambda: describe_job("train", cfg, folder))
            return train_from_config(cfg, folder, found, ranks)
    return None  # stopped before it began


def eval_job(cfg: DictConfig) -> float | None:
    """Evaluates a checkpoint."""
    with job_errors(cfg) as folder:
        from grpo.locate import find_for_evaluation

        remember_secrets(cfg)
        check_config(cfg)
        processes = count_processes(cfg)
        found = find_for_evaluation(cfg)

        with join_ranks(processes) as ranks:
            from grpo.evaluate import evaluate_from_config

            ranks.compute_on_first(lambda: describe_job("eval", cfg, folder))
            return evaluate_from_config(cfg, folder, found, ranks)
    return None  # never: an error has ended the process


@contextmanager
def job_errors(cfg: DictConfig) -> Iterator[Path]:
    """Yields a job's folder; an error ends a single job's process, and is raised in a sweep."""
    from grpo.memory.allocator import keep_freed_memory  # not where a config is refused
    from grpo.sweep.gpus import take_gpus
    from grpo.sweep.launch import SWEEP_ONLY_KEYS

    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    is_job = is_sweep_job()
    if is_job:
        leave_terminal()
        overrides = [o for o in hydra_config.overrides.task if parse_key(o) not in SWEEP_ONLY_KEYS]
        print_line(f"\njob {folder.name}: {' '.join(overrides)}")
    prepare_process()
    redact_logs()
    keep_freed_memory()  # before anything imports torch
    try:
        parallel = cfg.get("parallel")
        if is_job and (gpus := take_gpus(folder.parent, parallel.processes if parallel else 1)):
            print_line(f"on GPU {gpus}")
        yield folder
    except (ConfigError, RunError) as error:
        if is_job:
            if isinstance(error, RunLocked):
                print_line(str(error))  # and nothing into a folder that is another's
            else:
                note_failure(folder, str(error))
            # Hydra keeps the error to the sweep's end; its frames would keep the job's models.
            raise error.with_traceback(None) from None
        if isinstance(error, ConfigError):
            remove_unstarted(folder)
            refuse(error)
        fail(str(error))
    except KeyboardInterrupt:
        if not is_job:
            raise
        request_stop()  # nothing is lost: its training had not begun
    except Exception as error:
        if not is_job:
            raise
        # A fault, which ends this job and none of the others; it may have to cross to a process.
        log.exception("job %s failed", folder.name)
        reason = f"{type(error).__name__}: {error}"
        note_failure(folder, reason)
        raise RunError(reason) from None


def print_line(line: str) -> None:
    """Prints a line in one write, since other jobs may write to the same output."""
    print(f"{line}\n", end="", flush=True)
