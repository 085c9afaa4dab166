"""`grpo check [overrides]`: what a run or a sweep would do; nothing is started or left behind."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from grpo.commands.plan import plan_run
from grpo.config.validation import check_could_write

if TYPE_CHECKING:
    from grpo.sweep.launch import SweepPlan

MAX_JOBS_SHOWN = 5


def check_run(config: DictConfig) -> dict[str, Any]:
    """Prints and returns what a run of this config would do.

    Args:
        config: with Hydra's part of it.

    Raises:
        ConfigError: it would be refused.
    """
    with quiet_logs():
        plan = plan_run(config)
    print(format_plan(plan), flush=True)
    return {"kind": "run", **plan}


def check_sweep(config: DictConfig) -> dict[str, Any]:
    """Prints and returns which jobs a sweep would run, and what the first of them would do.

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


def format_plan(plan: Mapping[str, Any]) -> str:
    """Formats the lines that `grpo check` prints of a run."""
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
    """Formats a number as `1.7 million`."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.1f} {word}"
    return str(number)


def format_sweep_plan(found: Mapping[str, Any]) -> str:
    """Formats the lines that `grpo check -m` prints."""
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
