"""The composition root: from a config to parts, alone in knowing how they are put together."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from grpo.checkpoint import Checkpoints, Progress
from grpo.collect import Collector
from grpo.data.order import one_set, total_steps
from grpo.data.prompts import PromptFormat, WorkedExample, build_prompts, tokenized
from grpo.device import Device, open_device
from grpo.errors import ConfigError, RunError
from grpo.evaluate import Evaluation
from grpo.find import PROMPT_KEYS, Found, bind, check_options, named, plain
from grpo.hub import from_hub
from grpo.interrupt import Interrupt
from grpo.kl import KLPull, Pull
from grpo.models.adapter import Adapter, add_adapter
from grpo.models.load import LanguageModel, fingerprint, load_language_model
from grpo.models.reference import reference_of
from grpo.objective import (
    AGGREGATES,
    AVERAGINGS,
    BASELINES,
    DIVERGENCES,
    ESTIMATORS,
    RATIOS,
    SCALES,
    AdaptiveWeight,
    Normalize,
)
from grpo.optim import SCHEDULES, Optimizer
from grpo.past import is_finished, newest_step
from grpo.rewards import WeightedReward
from grpo.summary import Summary
from grpo.tracking import Console, JsonlFiles, RunInfo, Tracker
from grpo.tracking.console import evaluation_line
from grpo.train import Standing, Training, train
from grpo.types import Prompt, Sampling
from grpo.update import KLTerm, Objective

log = logging.getLogger(__name__)


def train_from_config(cfg: DictConfig, folder: Path, found: Found) -> float | None:
    """Runs one experiment in its folder and returns its objective.

    Raises:
        ConfigError: it can't be run as asked.
        RunError: it had to stop; what was done is saved.
        SystemExit: 130, it was interrupted and is saved.
    """
    run, standing = build_training(cfg, folder, found)
    summary = Summary(folder, cfg.objective, run.device)
    summary.write("running", standing.progress)
    status, error = "failed", "ended from outside"
    try:
        with Interrupt() as interrupt:
            train(run, standing, interrupt)
        done = standing.progress.step >= run.total_steps
        status, error = ("finished" if done else "interrupted"), ""
    except KeyboardInterrupt:
        status, error = "interrupted", ""
        raise
    except RunError as failure:
        error = str(failure)
        raise
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
        raise
    finally:
        content = summary.write(status, standing.progress, error)
        run.tracker.close(status, content)
    print(summary.closing(content), flush=True)
    if status == "interrupted":
        raise SystemExit(130)
    return summary.objective(content)


def evaluate_from_config(cfg: DictConfig, folder: Path, found: Found) -> float | None:
    """Evaluates a trained model on the evaluation rows; writes evaluation.json and prints it."""
    device = build_device(cfg)
    rewards = build_rewards(cfg)
    adapter = build_adapter(cfg)
    quantized = adapter is not None and adapter.quantized
    model = load_language_model(found.model(), device, quantized)
    prompts = tokenized(found.evaluation, prompt_format(cfg), model.tokenizer, "evaluation")
    check_fits(cfg, model, prompts)
    engine = bind(cfg.rollout, "rollout")(policy=model, max_new_tokens=cfg.max_new_tokens)
    evaluation = Evaluation(engine, prompts, rewards, cfg.eval.samples, build_sampling(cfg)).run()
    content = {"checkpoint": str(cfg.checkpoint), "prompts": len(prompts), **evaluation}
    (folder / "evaluation.json").write_text(json.dumps(content, indent=2) + "\n")
    print(f"{len(prompts)} prompts: {evaluation_line(evaluation)}")
    print(f"written to {folder / 'evaluation.json'}", flush=True)
    return evaluation[cfg.objective]


def build_training(cfg: DictConfig, folder: Path, found: Found) -> tuple[Training, Standing]:
    """All parts of a run and where it starts; what is cheap to find wrong is built first."""
    device = build_device(cfg)
    rewards = build_rewards(cfg)
    objective, advantage = build_objective(cfg), build_advantage(cfg)
    make_engine = bind(cfg.rollout, "rollout")
    make_sinks = [bind(node, f"tracking.{name}") for name, node in cfg.tracking.items()]
    format = prompt_format(cfg)
    policy, base = build_policy(cfg, found, device)
    prompts = build_prompts(found.train, found.evaluation, format, policy.tokenizer)
    check_fits(cfg, policy, [*prompts.train, *prompts.evaluation])

    # The reference is the model as it was loaded: copied before a checkpoint goes into the policy.
    pull = build_pull(cfg, policy, objective)
    steps = total_steps(len(prompts.train), cfg.batch_size, cfg.num_epochs, cfg.max_steps)
    optimizer = build_optimizer(cfg, policy, steps)
    checkpoints = Checkpoints(folder, cfg.checkpoint.keep, plain(cfg))
    start = starting_point(cfg, checkpoints, policy, optimizer, pull, steps, base)
    info = run_info(cfg, folder, start, steps)
    # Those that may refuse come first: until then nothing of the run is on disk.
    sinks = [*(make(info=info) for make in make_sinks), JsonlFiles(info), Console(info)]
    engine = make_engine(policy=policy, max_new_tokens=cfg.max_new_tokens)
    log.info(
        "%s: %d steps of %d x %d completions from %d prompts, on %s",
        info.name, steps, cfg.batch_size, cfg.num_generation, len(prompts.train), device.describe(),
    )  # fmt: skip
    collector = Collector(
        engine=engine,
        rewards=rewards,
        prompts=prompts.train,
        order=one_set(len(prompts.train), cfg.seed),
        sampling=objective.sampling,
        batch_size=cfg.batch_size,
        num_generation=cfg.num_generation,
        resample=cfg.algorithm.resample,
        seed=cfg.seed,
    )
    run = Training(
        policy=policy,
        collector=collector,
        pull=pull,
        optimizer=optimizer,
        objective=objective,
        advantage=advantage,
        evaluation=Evaluation(
            engine, prompts.evaluation, rewards, cfg.eval.samples, objective.sampling
        ),
        tracker=Tracker(sinks),
        checkpoints=checkpoints,
        device=device,
        token_budget=device.token_budget,
        seed=cfg.seed,
        total_steps=steps,
        eval_every=cfg.eval.every,
        checkpoint_every=cfg.checkpoint.every,
        log_prompts=cfg.log_prompts,
    )
    return run, Standing(start)


def build_device(cfg: DictConfig) -> Device:
    return open_device(cfg.device.kind, cfg.device.precision, cfg.device.token_budget)


def build_policy(cfg: DictConfig, found: Found, device: Device) -> tuple[LanguageModel, str]:
    """The model that is trained, under a fresh adapter where one is asked for; its fingerprint."""
    adapter = build_adapter(cfg)
    folder = found.model()
    quantized = adapter is not None and adapter.quantized
    policy = load_language_model(folder, device, quantized)
    base = fingerprint(policy.model)
    if adapter is not None:
        add_adapter(policy.model, adapter, cfg.seed)
    # A checkpoint of an adapter names its base: by id where that is how it is found again.
    name = cfg.model.id if cfg.model.id and from_hub(folder) else policy.base
    return replace(policy, base=name, recompute=cfg.device.gradient_checkpointing), base


def build_adapter(cfg: DictConfig) -> Adapter | None:
    return None if cfg.adapter is None else Adapter(**plain(cfg.adapter))


def prompt_format(cfg: DictConfig) -> PromptFormat:
    keys = {key: plain(cfg.dataset)[key] for key in PROMPT_KEYS}
    check_options(PromptFormat, keys, "dataset")
    try:
        worked = tuple(WorkedExample(**example) for example in keys.pop("worked_examples"))
    except TypeError as error:
        raise ConfigError(
            "dataset.worked_examples: each needs a question and an answer."
        ) from error
    return PromptFormat(worked_examples=worked, **keys)


def build_rewards(cfg: DictConfig) -> dict[str, WeightedReward]:
    """Each named callable: a class is made with its options, a function is called with them."""
    rewards = {}
    for name, node in cfg.reward.items():
        options = OmegaConf.masked_copy(node, [key for key in node if key != "weight"])
        bound = bind(options, f"reward.{name}")
        function = made(bound, f"reward.{name}") if inspect.isclass(bound.func) else bound
        if not takes_samples(function):
            raise ConfigError(
                f"reward.{name}._target_={node._target_}: should be called with a list of samples "
                f"and no more than the options given."
            )
        rewards[str(name)] = WeightedReward(function, float(node.weight))
    return rewards


def made(bound: Callable[[], Any], key: str) -> Any:
    """An instance of a user's class; what its constructor raises is refused under its key."""
    try:
        return bound()
    except Exception as error:
        raise ConfigError(f"{key}: can't be made ({type(error).__name__}: {error}).") from error


def takes_samples(function: Any) -> bool:
    try:
        inspect.signature(function).bind([])
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return callable(function)
    return True


def build_sampling(cfg: DictConfig) -> Sampling:
    options = plain(cfg.sampling)
    return Sampling(temperature=cfg.temperature, **options | {"stop": tuple(options["stop"])})


def build_objective(cfg: DictConfig) -> Objective:
    algorithm = cfg.algorithm
    return Objective(
        ratio=named(algorithm.ratio, RATIOS, "algorithm.ratio"),
        policy_loss=bind(algorithm.policy_loss, "algorithm.policy_loss"),
        averaging=named(algorithm.averaging, AVERAGINGS, "algorithm.averaging"),
        kl=build_kl_term(cfg),
        sampling=build_sampling(cfg),
        max_tokens=cfg.max_new_tokens,
        entropy_weight=algorithm.entropy_weight,
        mask_truncated=algorithm.mask_truncated,
        top_entropy=algorithm.top_entropy,
        num_iterations=algorithm.num_iterations,
        minibatches=algorithm.minibatches,
    )


def build_advantage(cfg: DictConfig) -> Callable[[Tensor, Tensor], Tensor]:
    algorithm = cfg.algorithm
    normalize = Normalize(
        named(algorithm.baseline, BASELINES, "algorithm.baseline"),
        named(algorithm.scale, SCALES, "algorithm.scale"),
    )
    aggregate = named(algorithm.aggregate, AGGREGATES, "algorithm.aggregate")
    return functools.partial(aggregate, normalize=normalize)


def build_kl_term(cfg: DictConfig) -> KLTerm | None:
    """None without a reference: kl=none, or a weight of 0."""
    kl = cfg.kl
    if kl.estimator is None or cfg.kl_weight == 0:
        return None
    exact = kl.estimator == "full"
    table = {**ESTIMATORS[kl.direction], "full": None}
    return KLTerm(
        estimator=named(kl.estimator, table, "kl.estimator"),
        divergence=DIVERGENCES[kl.direction] if exact else None,
        in_reward=kl.within == "reward",
        unbiased_gradient=kl.unbiased_gradient,
    )


def build_pull(cfg: DictConfig, policy: LanguageModel, objective: Objective) -> Pull:
    if objective.kl is None:
        return Pull()
    return KLPull(
        policy,
        reference_of(policy, moves=cfg.kl.sync_every > 0),
        objective.kl,
        AdaptiveWeight(cfg.kl_weight, cfg.kl.target, cfg.kl.horizon),
        objective.sampling,
        policy.device.token_budget,
        cfg.kl.sync_every,
        cfg.kl.sync_share,
    )


def build_optimizer(cfg: DictConfig, policy: LanguageModel, steps: int) -> Optimizer:
    return Optimizer(
        policy.model,
        cfg.optim.name,
        learning_rate=cfg.learning_rate,
        # The schedule counts updates.
        total_steps=steps * cfg.algorithm.num_iterations * cfg.algorithm.minibatches,
        schedule=SCHEDULES[cfg.optim.schedule],
        warmup_steps=cfg.optim.warmup_steps,
        weight_decay=cfg.optim.weight_decay,
        betas=(cfg.optim.betas[0], cfg.optim.betas[1]),
        max_grad_norm=cfg.optim.max_grad_norm,
    )


def check_fits(cfg: DictConfig, policy: LanguageModel, prompts: Sequence[Prompt]) -> None:
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if longest + cfg.max_new_tokens > policy.context:
        raise ConfigError(
            f"max_new_tokens={cfg.max_new_tokens}: with a prompt of {longest} tokens that is more "
            f"than the model's context of {policy.context}; lower it or dataset.max_prompt_tokens."
        )


def starting_point(
    cfg: DictConfig,
    checkpoints: Checkpoints,
    policy: LanguageModel,
    optimizer: Optimizer,
    pull: Pull,
    steps: int,
    base: str,
) -> Progress:
    """Step 0 of a new run, or the newest whole checkpoint of this one."""
    run = checkpoints.run
    if cfg.resume is None or (cfg.resume == "auto" and newest_step(run) is None):
        if cfg.resume == "auto":
            log.info("resume=auto: no unfinished run with these overrides, so a new one starts.")
        return Progress(step=0, run_id=uuid.uuid4().hex[:8], base=base, unlogged={})
    start = checkpoints.load(policy, optimizer, pull)
    if start.base != base:
        raise ConfigError(
            f"resume={cfg.resume}: model={cfg.model.name} has other weights now than when this run "
            f"began, so its reference would be another one."
        )
    if start.step >= steps and is_finished(run):
        raise ConfigError(
            f"resume={cfg.resume}: this run has done its {steps} steps already; raise max_steps or "
            f"num_epochs to go on."
        )
    return start


def run_info(cfg: DictConfig, folder: Path, start: Progress, steps: int) -> RunInfo:
    hydra = HydraConfig.get()
    name = cfg.name or f"{cfg.model.name}-{hydra.runtime.choices['dataset']}"
    in_sweep = hydra.mode == RunMode.MULTIRUN
    return RunInfo(
        id=start.run_id,
        name=f"{name}-{hydra.job.num}" if in_sweep else name,
        folder=folder,
        config=plain(cfg),
        group=Path(hydra.sweep.dir).name if in_sweep else None,
        first_step=start.step,
        logged_step=start.step if start.unlogged is None else start.step - 1,
        total_steps=steps,
    )
