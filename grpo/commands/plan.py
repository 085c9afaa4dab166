"""Plans a run: what it would do by its config, as far as that is known without weights."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from grpo.config.check import check_config, check_training
from grpo.config.check_parallel import check_enough_prompts
from grpo.config.schema import remove_hydra
from grpo.config.unused_keys import Facts, explain_unused_keys
from grpo.errors import ConfigError
from grpo.locate import RunInputs, find_for_training
from grpo.models.hub import find_cached_model
from grpo.models.remote_code import has_remote_code
from grpo.runs.folder import check_run_folder, find_newest_checkpoint

if TYPE_CHECKING:
    from grpo.device import Device


def plan_run(config: DictConfig) -> dict[str, Any]:
    """Returns what a run of this config would do, as docs/reference/json.md lists it.

    Raises:
        ConfigError: the run would raise it before it loads weights.
    """
    cfg = remove_hydra(config)
    hydra = config.hydra
    check_config(cfg)
    check_training(cfg)
    if cfg.parallel is not None and cfg.parallel.processes is not None:
        check_enough_prompts(cfg, cfg.parallel.processes)
    folder = Path(str(hydra.run.dir))
    resumed = find_newest_checkpoint(folder) if cfg.resume else None
    check_run_folder(folder, cfg.resume, cfg.model, cfg.adapter)
    found = find_for_training(cfg)
    model_folder = find_model_here(cfg.model, found)
    HydraConfig.instance().set_config(config)
    device, prompts, updates, ignored = build_cheap_parts(cfg, config, found, model_folder)
    rows = prompts[0] if prompts else sum(len(part.train) for part in found.sets)
    from grpo.build.objective import describe_kl
    from grpo.data.order import count_steps

    steps = count_steps(rows, cfg.batch_size, cfg.num_epochs, cfg.max_steps)
    from grpo.build.model import is_exact

    parameters = count_parameters(model_folder) if model_folder else None
    facts = Facts(
        exact_sampler=is_exact(cfg, device),
        updates=steps * updates,
        own_code=model_folder is not None and has_remote_code(model_folder),
    )
    choices = hydra.runtime.choices
    kl = describe_kl(cfg)
    memory = estimate_least_gb(cfg, device, parameters, with_reference=kl is not None)
    return {
        "model": {
            "name": cfg.model.name,
            "id": cfg.model.id,
            "folder": str(model_folder) if model_folder else None,
            "parameters": parameters,
        },
        "dataset": {"name": str(choices.dataset), **describe_data(found, prompts)},
        "reward": {str(name): float(part.get("weight", 1.0)) for name, part in cfg.reward.items()},
        "algorithm": str(choices.algorithm),
        "kl": kl,
        "learning_rate": cfg.learning_rate,
        "steps": steps,
        "steps_done": int(resumed.name[5:]) if resumed else 0,
        "batch_size": cfg.batch_size,
        "num_generation": cfg.num_generation,
        "completions": steps * cfg.batch_size * cfg.num_generation,
        "max_new_tokens": cfg.max_new_tokens,
        "trained": "all" if cfg.adapter is None else str(choices.adapter),
        "trained_parameters": parameters if cfg.adapter is None else None,
        "device": device.describe(),
        "memory_gb_at_least": memory[0] if memory else None,
        "memory_gb_here": memory[1] if memory else None,
        "objective": cfg.objective,
        "folder": str(folder),
        "ignored": [*explain_unused_keys(cfg, hydra.overrides.task, facts), *ignored],
    }  # fmt: skip


def describe_data(found: RunInputs, prompts: tuple[int, int] | None) -> dict[str, int | None]:
    """Counts the rows, and the prompts that are short enough, where a tokenizer has told."""
    training, evaluation = prompts or (None, None)
    return {
        "training_rows": sum(len(part.train) for part in found.sets),
        "evaluation_rows": sum(len(part.evaluation) for part in found.sets),
        "training_prompts": training,
        "evaluation_prompts": evaluation,
    }


def find_model_here(model: DictConfig, found: RunInputs) -> Path | None:
    """Returns the model's folder on this machine; None if a run would download it."""
    if model.packaged is not None or model.path is not None:
        return found.model()
    return find_cached_model(model.id, model.revision, with_code=model.trust_remote_code)


def build_cheap_parts(
    cfg: DictConfig, config: DictConfig, found: RunInputs, model: Path | None
) -> tuple[Device, tuple[int, int] | None, int, list[str]]:
    """Builds the parts of a run that need no weights, because building them may be refused.

    Returns:
        The device; the numbers of prompts to train and to evaluate on, or None if the tokenizer
        is not on this machine; the updates in a step; the reason why a given KL is ignored.
    """
    from grpo.build.data import build_curriculum, build_prompt_format, build_prompts, build_rewards
    from grpo.build.model import bind_engine
    from grpo.build.objective import (
        build_advantage,
        build_objective,
        count_updates_per_step,
        explain_unused_kl,
    )
    from grpo.build.tracking import bind_sinks
    from grpo.device import open_device

    device = open_device(cfg.device.kind, cfg.device.precision)
    for reward in build_rewards(cfg, found).values():
        reward.close()
    build_objective(cfg)
    build_advantage(cfg)
    build_curriculum(cfg)
    bind_engine(cfg)
    bind_sinks(cfg)
    formats = [build_prompt_format(part.options, part.key) for part in found.sets]
    counts = None
    if model is not None:
        from transformers import AutoTokenizer

        from grpo.models.weights import loading_errors

        with loading_errors(model):
            tokenizer = AutoTokenizer.from_pretrained(
                model, trust_remote_code=cfg.model.trust_remote_code
            )
        prompts = build_prompts(found, formats, tokenizer)
        counts = len(prompts.train), len(prompts.evaluation)
    unused = explain_unused_kl(cfg, config.hydra.overrides.task, config.hydra.runtime.choices["kl"])
    return device, counts, count_updates_per_step(cfg), [unused] if unused else []


def count_parameters(model: Path) -> int | None:
    """Counts the weights in a model's folder, from the headers of its files."""
    files = sorted(model.glob("*.safetensors"))
    return sum(map(math.prod, (shape for file in files for shape in read_shapes(file)))) or None


def read_shapes(file: Path) -> Iterator[Sequence[int]]:
    """Yields the shape of each tensor of a safetensors file: a length, then its JSON header."""
    with file.open("rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(size))
    return (tensor["shape"] for name, tensor in header.items() if name != "__metadata__")


def estimate_least_gb(
    cfg: DictConfig, device: Device, parameters: int | None, *, with_reference: bool
) -> tuple[float, float] | None:
    """Estimates the GB that weights, gradients and optimizer take, and those that may be used.

    A run measures the rest, which depends on lengths, after it has loaded the model.

    Returns:
        Both, or None if the number of weights isn't known, or a process doesn't train all of them.

    Raises:
        ConfigError: they take more than may be used.
    """
    from grpo.memory.estimate import LIBRARIES_GB, OPTIMIZER_BYTES, get_usable_memory

    divided = cfg.parallel is not None and cfg.parallel.strategy == "fsdp"
    if parameters is None or cfg.adapter is not None or divided:
        return None
    kind = device.torch_device.type
    rounded = device.autocast_dtype is not None and not cfg.kl.sync_every
    reference = (2 if rounded else 4) * with_reference
    each = 4 + 4 + OPTIMIZER_BYTES[cfg.optim.name] + reference
    least = LIBRARIES_GB[kind] + parameters * each / 1e9
    usable = get_usable_memory(device.torch_device, cfg.device.memory_gb)
    if least > usable and cfg.device.token_budget is None:
        raise ConfigError(
            f"device.memory_gb={cfg.device.memory_gb or 'null'}: libraries, weights, gradients and "
            f"optimizer alone take {least:.1f} GB, and {usable:.1f} GB may be used; take a smaller "
            f"model, adapter=lora or optim.name=adamw_8bit.",
            key="device.memory_gb", value=cfg.device.memory_gb,
        )  # fmt: skip
    return round(least, 3), round(usable, 3)
