"""How many processes a run has, and what the first of them sends to the others."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from grpo.errors import ConfigError
from grpo.parallel.start import count_launched, is_launched
from grpo.sweep.gpus import list_gpus


@dataclass(frozen=True)
class Job:
    """A run's or an evaluation's config, and what else a process needs to take part in it."""

    command: str  # train or eval
    config: DictConfig
    hydra: HydraConf
    folder: Path
    working_directory: str
    import_path: list[str]


def describe_job(command: str, cfg: DictConfig, folder: Path) -> Job:
    hydra = HydraConfig.instance().cfg
    assert hydra is not None
    return Job(command, cfg, hydra, folder.absolute(), os.getcwd(), list(sys.path))


def count_processes(cfg: DictConfig) -> int | None:
    """Returns how many processes to start on this machine; None if torchrun has started them.

    Raises:
        ConfigError: the number can't be had, or is not that of torchrun.
    """
    launched = count_launched() if is_launched() else None
    parallel = cfg.parallel
    if parallel is None:
        if launched is not None and launched > 1:
            raise ConfigError(
                f"parallel=none: torchrun has started {launched} processes, of which a run without "
                f"parallel uses one; add parallel=ddp.",
                key="parallel",
                value="none",
            )
        return 1
    wanted = parallel.processes
    if launched is not None and wanted is not None and launched != wanted:
        raise ConfigError(
            f"parallel.processes={wanted}: torchrun has started {launched}; leave it out.",
            key="parallel.processes",
            value=wanted,
        )
    processes = launched or wanted or count_gpus(cfg.device.kind)
    if launched is None and cfg.device.kind == "cuda" and processes > len(list_gpus()):
        raise ConfigError(
            f"parallel.processes={processes}: this machine has {len(list_gpus())} GPUs, and each "
            f"process needs its own.",
            key="parallel.processes",
            value=processes,
        )
    return None if launched is not None else processes


def count_gpus(kind: str) -> int:
    found = len(list_gpus()) if kind in ("auto", "cuda") else 0
    if not found:
        raise ConfigError(
            "parallel.processes is not set, and there is no GPU to take the number from: "
            "parallel.processes=2, for example, divides the cores among two.",
            key="parallel.processes",
        )
    return found
