"""Builds device, model, memory budget and sampler from a config."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from grpo.config.binding import bind, resolve_node
from grpo.data.prompts import (
    LazyPrompts,
)
from grpo.device import Device, open_device
from grpo.errors import ConfigError
from grpo.locate import RunInputs
from grpo.memory.allocator import (
    LARGEST_KEPT_BLOCK,
    LARGEST_KEPT_BLOCK_IN_BF16,
    keep_freed_memory,
)
from grpo.memory.budget import Budget
from grpo.memory.estimate import Workload, choose_budget, estimate_memory
from grpo.memory.sharding import Sharding
from grpo.models.adapter import Adapter, add_adapter
from grpo.models.files import is_quantized
from grpo.models.forward import forward_shared_prompt
from grpo.models.hub import is_in_hub_cache, read_commit
from grpo.models.load import LanguageModel, load_language_model
from grpo.models.long_context import prepare_for_lengths
from grpo.models.recompute import find_decoder_layers
from grpo.parallel import ONE_RANK, Ranks
from grpo.rollout import Engine, HFEngine, NativeEngine
from grpo.rollout.sampler_check import check_sampler
from grpo.runs.resume import read_past_precision
from grpo.types import Prompt

log = logging.getLogger(__name__)


def build_device(cfg: DictConfig, run: Path | None = None, ranks: Ranks = ONE_RANK) -> Device:
    """Opens the device.

    Args:
        run: a run's folder; if the run is resumed, precision=auto is what it computed in before.
        ranks: each on a machine gets a GPU of its own.
    """
    precision = cfg.device.precision
    if run is not None and cfg.resume is not None and precision == "auto":
        precision = read_past_precision(run) or precision
    device = open_device(cfg.device.kind, precision, ranks.local_index)
    if device.torch_device.type == "cpu":
        keep_freed_memory(
            LARGEST_KEPT_BLOCK
            if (device.autocast_dtype is None or device.has_fast_bf16)
            and not divides_weights(cfg, ranks)
            else LARGEST_KEPT_BLOCK_IN_BF16
        )
    return device


def build_policy(cfg: DictConfig, found: RunInputs, device: Device) -> tuple[LanguageModel, str]:
    """Loads the model to train, under a new adapter if one is configured.

    Returns:
        The model, and the fingerprint of its weights.

    Raises:
        ConfigError: the model can't be trained with this config.
    """
    adapter, folder = build_adapter(cfg), found.model()
    policy = load_model(cfg, folder, device, frozen=adapter is not None)
    if getattr(policy.model, "is_quantized", False) and is_quantized(folder):
        raise ConfigError(
            f"model={cfg.model.name}: its weights are already quantized, so they can't be trained; "
            f"use the model they were made from; adapter=qlora loads that in 4 bits.",
            key="model",
            value=cfg.model.name,
        )
    if adapter is not None:
        add_adapter(policy.model, adapter, cfg.seed)
    # An adapter's checkpoint names its base model: by id if the hub cache has it under that id.
    name = cfg.model.id if cfg.model.id and is_in_hub_cache(folder) else policy.base
    commit = read_commit(folder) if name == cfg.model.id else None
    if cfg.device.gradient_checkpointing and not find_decoder_layers(policy.model):
        raise ConfigError(
            f"device.gradient_checkpointing=true: {type(policy.model).__name__} has no layers that "
            f"can be recomputed."
        )
    recompute = cfg.device.gradient_checkpointing
    return replace(policy, base=name, commit=commit, recompute=recompute), policy.fingerprint


def build_sharding(cfg: DictConfig, policy: LanguageModel, ranks: Ranks) -> Sharding | None:
    """Prepares to divide the weights among the ranks; None if each has all of them.

    Raises:
        ConfigError: the model can't be divided, or there is nothing to offload from.
    """
    if not divides_weights(cfg, ranks):
        return None
    if policy.forward is not forward_shared_prompt:
        raise ConfigError(
            f"parallel=fsdp: {type(policy.model).__name__} can't share a prompt among completions, "
            f"and its usual forward pass has another number of calls on each rank; use "
            f"parallel=ddp.",
            key="parallel",
            value="fsdp",
        )
    if cfg.parallel.offload and policy.device.torch_device.type == "cpu":
        raise ConfigError(
            "parallel.offload=True: the device is the CPU, which has nothing to offload from; "
            "leave it out.",
            key="parallel.offload",
            value=True,
        )
    return Sharding(policy, cfg.parallel.offload)


def divides_weights(cfg: DictConfig, ranks: Ranks) -> bool:
    return ranks.size > 1 and cfg.parallel is not None and bool(cfg.parallel.strategy == "fsdp")


def load_model(cfg: DictConfig, folder: Path, device: Device, frozen: bool) -> LanguageModel:
    """Loads the model in a folder, in 4 bits if its adapter is quantized.

    Args:
        frozen: see `load_language_model`.
    """
    adapter = build_adapter(cfg)
    quantized = adapter is not None and adapter.quantized
    return load_language_model(folder, device, quantized, frozen, cfg.model.trust_remote_code)


def build_budget(
    cfg: DictConfig,
    policy: LanguageModel,
    longest: int,
    with_reference: bool,
    ranks: Ranks = ONE_RANK,
) -> Budget:
    """Chooses how much is computed at once.

    Args:
        longest: tokens of the longest prompt and its completion.
        with_reference: whether a copy of the model is the reference.
        ranks: those on one machine share its memory, unless each has a GPU.
    """
    work = Workload(
        prompt=longest - cfg.max_new_tokens,
        completion=cfg.max_new_tokens,
        group=cfg.num_generation,
        optimizer=cfg.optim.name,
        reference=with_reference,
        reference_moves=cfg.kl.sync_every > 0,
        shards=ranks.size if divides_weights(cfg, ranks) else 1,
        offload=divides_weights(cfg, ranks) and cfg.parallel.offload,
        ahead=bool(cfg.rollout.get("ahead")),
    )
    options, device = cfg.device, policy.device.torch_device
    held = estimate_memory(policy, work)
    return choose_budget(
        device,
        options.memory_gb,
        options.token_budget,
        options.cache_budget,
        held,
        longest,
        processes=1 if device.type == "cuda" else ranks.local_size,
        overlaps=work.ahead,
    )


def build_adapter(cfg: DictConfig) -> Adapter | None:
    return None if cfg.adapter is None else Adapter(**resolve_node(cfg.adapter))


def bind_engine(cfg: DictConfig) -> functools.partial[Any]:
    """Returns the sampler's class with its own keys bound; `ahead` is the run's."""
    node = {key: value for key, value in resolve_node(cfg.rollout).items() if key != "ahead"}
    return bind(node, "rollout", ["ahead"])


def is_exact(cfg: DictConfig, device: Device) -> bool:
    """Returns whether sampler and policy will give the same probabilities, but for rounding."""
    in_torch = str(cfg.rollout.get("_target_")).rpartition(".")[2] in ("NativeEngine", "HFEngine")
    return in_torch and device.autocast_dtype is None and not cfg.rollout.get("ahead")


def build_engine(
    make_engine: functools.partial[Any], policy: LanguageModel, max_new_tokens: int, budget: Budget
) -> Engine:
    """Builds the sampler, after a check on a few tokens where that is cheap.

    Raises:
        ConfigError: it can't sample from this model, or its probabilities differ from the model's.
    """
    if make_engine.func in (NativeEngine, HFEngine):
        check_sampler(make_engine, policy)
    engine: Engine = make_engine(policy=policy, max_new_tokens=max_new_tokens, budget=budget)
    return engine


def fit_to_lengths(
    cfg: DictConfig,
    policy: LanguageModel,
    prompts: Sequence[Prompt],
    train: Sequence[Prompt] = (),
) -> tuple[LanguageModel, int]:
    """Prepares the model for the lengths of these prompts and their completions.

    Lazy prompts that exceed the context are left out; they count as long as they may become.

    Returns:
        The model, and the tokens of the longest prompt and its completion.

    Raises:
        ConfigError: these are more than the model's context.
    """
    known = [] if isinstance(train, LazyPrompts) else train
    longest = max(len(prompt.token_ids) for prompt in (*prompts, *known))
    if isinstance(train, LazyPrompts):
        train.check_lengths(policy.context_length - cfg.max_new_tokens)
        longest = max(longest, train.max_tokens)
    if longest + cfg.max_new_tokens > policy.context_length:
        raise ConfigError(
            f"max_new_tokens={cfg.max_new_tokens}: with a prompt of {longest} tokens that is more "
            f"than the model's context of {policy.context_length}; lower it or "
            f"dataset.max_prompt_tokens.",
            key="max_new_tokens",
            value=cfg.max_new_tokens,
        )
    policy = prepare_for_lengths(policy, longest, cfg.max_new_tokens)
    return policy, longest + int(cfg.max_new_tokens)
