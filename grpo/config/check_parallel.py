"""Checks how a run is divided among processes."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from grpo.config.validation import check_at_least, check_choice
from grpo.errors import ConfigError


def check_parallel(cfg: DictConfig) -> None:
    if cfg.parallel is None:
        return
    check_choice(cfg, "parallel.strategy", ("ddp", "fsdp"))
    check_at_least(cfg, "parallel.processes", 1, optional=True)
    if cfg.rollout.get("ahead"):
        raise ConfigError(
            f"rollout.ahead={cfg.rollout.ahead}: parallel={cfg.parallel.strategy} samples with all "
            f"ranks, which also compute the update; leave one of them out.",
            key="rollout.ahead",
            value=cfg.rollout.ahead,
        )
    if cfg.device.kind == "mps":
        raise ConfigError(
            f"parallel={cfg.parallel.strategy}: device=mps is one GPU, and runs one process; leave "
            f"parallel out, or use device=cpu.",
            key="parallel",
            value=cfg.parallel.strategy,
        )
    if cfg.parallel.strategy == "fsdp":
        check_divisible_weights(cfg)
    elif cfg.parallel.offload:
        raise ConfigError(
            f"parallel.offload=True: parallel={cfg.parallel.strategy} keeps all on its device; "
            f"use parallel=fsdp.",
            key="parallel.offload",
            value=True,
        )


def check_divisible_weights(cfg: DictConfig) -> None:
    """Refuses what can't be divided among processes: 4-bit weights and 8-bit optimizer states."""
    refused = {
        "adapter.quantized": OmegaConf.select(cfg, "adapter.quantized") or False,
        "optim.name": cfg.optim.name == "adamw_8bit",
    }
    for key in [key for key, is_refused in refused.items() if is_refused]:
        value = OmegaConf.select(cfg, key)
        raise ConfigError(
            f"{key}={value}: parallel=fsdp can't divide it among processes; use parallel=ddp.",
            key=key,
            value=value,
        )
    if cfg.parallel.offload and cfg.device.kind == "cpu":
        raise ConfigError(
            "parallel.offload=True: device=cpu has nothing to offload from; leave it out.",
            key="parallel.offload",
            value=True,
        )


def check_enough_prompts(cfg: DictConfig, processes: int) -> None:
    if processes > cfg.batch_size:
        raise ConfigError(
            f"batch_size={cfg.batch_size}: each of {processes} processes needs a prompt in every "
            f"step; raise it to {processes} or more, or lower parallel.processes.",
            key="batch_size",
            value=cfg.batch_size,
        )
