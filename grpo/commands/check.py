"""`grpo check [overrides]`: what a run or a sweep would do; nothing is started or left behind."""

from __future__ import annotations

import json
import logging
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from grpo.config.check import check_config, check_training
from grpo.config.schema import remove_hydra
from grpo.config.unused_keys import Facts, explain_unused_keys
from grpo.config.validation import check_could_write
from grpo.errors import ConfigError
from grpo.locate import RunInputs, find_for_training
from grpo.models.hub import find_cached_model
from grpo.models.remote_code import has_remote_code
from grpo.runs.folder import check_run_folder, find_newest_checkpoint

if TYPE_CHECKING:
    from grpo.device import Device
    from grpo.sweep.launch import SweepPlan

MAX_JOBS_SHOWN = 5


def check_run(config: DictConfig) -> dict[str, Any]:
    """Says what a run of this config, Hydra's part of it included, would do.

    Raises:
        ConfigError: it would be refused.
    """
    with quiet_logs():
        plan = plan_run(config)
    print(format_plan(plan), flush=True)
    return {"kind": "run", **plan}


def check_sweep(config: DictConfig) -> dict[str, Any]:
    """Says which jobs a sweep of this config would run, and what the first of them would do.

    Raises:
        ConfigError: it would be refused.
    """
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None  # Hydra calls back once it has composed
    context = HydraContext(config_loader=hydra.config_loader, callbacks=None)  # type: ignore[arg-type]
    sweeper = Plugins.instance().instantiate_sweeper(
        config=config, hydra_context=context, task_function=lambda _: None
    )
    arguments = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    plan: SweepPlan = sweeper.plan(arguments)  # type: ignore[attr-defined]
    check_could_write(plan.launch.folder, "sweep_dir")
    with quiet_logs():
        job = plan_run(plan.launch.compose_whole(plan.examples[0]))
    job["folder"] = str(plan.launch.folder / "0")
    found = {
        "kind": plan.kind,
        "folder": str(plan.launch.folder),
        "jobs": plan.total,
        "jobs_left": plan.left,
        "objectives": plan.objectives,
        "first_jobs": plan.examples[:MAX_JOBS_SHOWN],
        "space": plan.space,
        "first_job": job,
    }
    print(format_sweep_plan(found), flush=True)
    return found


@contextmanager
def quiet_logs() -> Iterator[None]:
    """Within it, parts that are built don't log what a run would."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def plan_run(config: DictConfig) -> dict[str, Any]:
    """What a run would do.

    Raises:
        ConfigError: as the run itself would, up to where it loads weights.
    """
    cfg = remove_hydra(config)
    hydra = config.hydra
    check_config(cfg)
    check_training(cfg)
    folder = Path(str(hydra.run.dir))
    resumed = find_newest_checkpoint(folder) if cfg.resume else None
    check_run_folder(folder, cfg.resume, cfg.model, cfg.adapter)
    found = find_for_training(cfg)
    model_folder = find_model_here(cfg.model, found)
    HydraConfig.instance().set_config(config)
    device, prompts, updates, ignored = build_cheap_parts(cfg, config, found, model_folder)
    rows = prompts[0] if prompts else sum(len(own.train) for own in found.sets)
    from grpo.build.objective import describe_kl
    from grpo.data.order import count_steps

    steps = count_steps(rows, cfg.batch_size, cfg.num_epochs, cfg.max_steps)
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
        "dataset": {
            "name": str(choices.dataset),
            "training_rows": sum(len(own.train) for own in found.sets),
            "evaluation_rows": sum(len(own.evaluation) for own in found.sets),
            "training_prompts": prompts[0] if prompts else None,
            "evaluation_prompts": prompts[1] if prompts else None,
        },
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


def find_model_here(model: DictConfig, found: RunInputs) -> Path | None:
    """The model's folder where it is on this machine; None where a run would download it."""
    if model.packaged is not None or model.path is not None:
        return found.model()
    return find_cached_model(model.id, model.revision, with_code=model.trust_remote_code)


def build_cheap_parts(
    cfg: DictConfig, config: DictConfig, found: RunInputs, model: Path | None
) -> tuple[Device, tuple[int, int] | None, int, list[str]]:
    """Builds what a run builds without weights, for what it may refuse.

    Returns:
        The device; how many prompts there are to train and to evaluate on, None without a
        tokenizer here; updates a step; and why a KL that was given is ignored, if it is.
    """
    from grpo.build.data import build_curriculum, build_prompt_format, build_prompts, build_rewards
    from grpo.build.objective import (
        build_advantage,
        build_objective,
        count_updates_per_step,
        explain_unused_kl,
    )
    from grpo.build.tracking import bind_sinks
    from grpo.config.binding import bind
    from grpo.device import open_device

    device = open_device(cfg.device.kind, cfg.device.precision)
    for reward in build_rewards(cfg, found).values():
        reward.close()
    build_objective(cfg)
    build_advantage(cfg)
    build_curriculum(cfg)
    bind(cfg.rollout, "rollout")
    bind_sinks(cfg)
    formats = [build_prompt_format(own.options, own.key) for own in found.sets]
    counts = None
    if model is not None:
        from transformers import AutoTokenizer

        from grpo.models.load import loading_errors

        with loading_errors(model):
            tokenizer = AutoTokenizer.from_pretrained(
                model, trust_remote_code=cfg.model.trust_remote_code
            )
        prompts = build_prompts(found, formats, tokenizer)
        counts = len(prompts.train), len(prompts.evaluation)
    unused = explain_unused_kl(cfg, config.hydra.overrides.task, config.hydra.runtime.choices["kl"])
    return device, counts, count_updates_per_step(cfg), [unused] if unused else []


def is_exact(cfg: DictConfig, device: Device) -> bool:
    """Whether the sampler's probabilities will be the policy's own, but for rounding."""
    own = str(cfg.rollout.get("_target_")).rpartition(".")[2] in ("NativeEngine", "HFEngine")
    return own and device.autocast_dtype is None


def count_parameters(model: Path) -> int | None:
    """How many weights there are in a model's folder, by the headers of its files alone."""
    files = sorted(model.glob("*.safetensors"))
    return sum(map(math.prod, (shape for file in files for shape in read_shapes(file)))) or None


def read_shapes(file: Path) -> Iterator[Sequence[int]]:
    """The shape of each tensor in a safetensors file: a length, then that many bytes of JSON."""
    with file.open("rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(size))
    return (own["shape"] for name, own in header.items() if name != "__metadata__")


def estimate_least_gb(
    cfg: DictConfig, device: Device, parameters: int | None, *, with_reference: bool
) -> tuple[float, float] | None:
    """What weights, gradients and optimizer take, and what there is; None where it isn't known.

    A run measures the rest, which depends on lengths, once it has loaded the model.

    Raises:
        ConfigError: there is not even so much.
    """
    from grpo.memory.estimate import (
        LIBRARIES_GB,
        OPTIMIZER_BYTES,
        USABLE_SHARE,
        get_total_memory,
    )

    if parameters is None or cfg.adapter is not None:
        return None
    kind = device.torch_device.type
    rounded = device.autocast_dtype is not None and not cfg.kl.sync_every
    reference = (2 if rounded else 4) * with_reference
    each = 4 + 4 + OPTIMIZER_BYTES[cfg.optim.name] + reference
    least = LIBRARIES_GB[kind] + parameters * each / 1e9
    there = cfg.device.memory_gb or USABLE_SHARE[kind] * get_total_memory(device.torch_device)
    if least > there and cfg.device.token_budget is None:
        raise ConfigError(
            f"device.memory_gb={cfg.device.memory_gb or 'null'}: libraries, weights, gradients and "
            f"optimizer alone take {least:.1f} GB, and {there:.1f} GB may be used; take a smaller "
            f"model, adapter=lora or optim.name=adamw_8bit.",
            key="device.memory_gb", value=cfg.device.memory_gb,
        )  # fmt: skip
    return round(least, 3), round(there, 3)


def format_plan(plan: Mapping[str, Any]) -> str:
    """The lines that `grpo check` prints of a run."""
    from grpo.build.objective import format_kl

    model, data, kl = plan["model"], plan["dataset"], plan["kl"]
    size = f", {format_count(model['parameters'])} parameters" if model["parameters"] else ""
    place = "" if model["folder"] else ", to be downloaded"
    usable = [data["training_prompts"], data["evaluation_prompts"]]
    rows = [data["training_rows"], data["evaluation_rows"]]
    left_out = sum(rows) - sum(usable) if all(n is not None for n in usable) else 0
    shown = f"{rows[0]} rows to train on, {rows[1]} to evaluate on"
    weights = ", ".join(f"{name} x {weight:g}" for name, weight in plan["reward"].items())
    rate = f"learning rate {plan['learning_rate']:g}"
    done = f" ({plan['steps_done']} done)" if plan["steps_done"] else ""
    memory = plan["memory_gb_at_least"]
    lines = {
        "model": f"{model['name']}{size}{place}",
        "data": f"{data['name']}: {shown}" + (f"; {left_out} of them left out" if left_out else ""),
        "reward": weights,
        "algorithm": f"{plan['algorithm']}, {format_kl(kl)}, {rate}",
        "steps": f"{plan['steps']}{done} of {plan['batch_size']} x {plan['num_generation']} "
        f"completions, up to {plan['max_new_tokens']} tokens each",
        "trained": "the whole model" if plan["trained"] == "all" else f"adapter={plan['trained']}",
        "device": plan["device"],
        "memory": f"at least {memory:.1f} GB of {plan['memory_gb_here']:.1f} GB"
        if memory
        else "known once the model is loaded",
        "folder": plan["folder"],
    }
    width = max(map(len, lines)) + 2
    shown_lines = [f"  {name + ':':{width}}{value}" for name, value in lines.items()]
    return "\n".join(["this run would train:", *shown_lines, *(f"  {o}" for o in plan["ignored"])])


def format_count(number: int) -> str:
    """`1.7 million`"""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.1f} {word}"
    return str(number)


def format_sweep_plan(found: Mapping[str, Any]) -> str:
    """The lines that `grpo check -m` prints."""
    objectives = ", ".join(f"{way} {metric}" for metric, way in found["objectives"].items())
    what = "jobs" if found["kind"] == "grid" else "trials"
    left = f", {found['jobs_left']} of them left" if found["jobs_left"] < found["jobs"] else ""
    lines = [f"this {found['kind']} would run {found['jobs']} {what}{left}, to {objectives}:"]
    if found["kind"] == "grid":
        lines += [f"  {' '.join(job)}" for job in found["first_jobs"]]
        more = found["jobs"] - len(found["first_jobs"])
        lines += [f"  and {more} more"] if more > 0 else []
    else:
        lines += [f"  {key}: {values}" for key, values in found["space"].items()]
    lines += [f"  in {found['folder']}"]
    return "\n".join([*lines, "of its first job:", format_plan(found["first_job"])])
