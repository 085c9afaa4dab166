"""The composition root: builds the parts of a run from its config and connects them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from grpo.build.data import (
    build_curriculum,
    build_evaluation,
    build_order,
    build_prompt_format,
    build_prompts,
    build_rewards,
)
from grpo.build.model import (
    bind_engine,
    build_budget,
    build_device,
    build_engine,
    build_policy,
    build_sharding,
    fit_to_lengths,
    is_exact,
)
from grpo.build.objective import (
    build_advantage,
    build_kl_penalty,
    build_objective,
    build_optimizer,
    count_updates_per_step,
    describe_kl,
    format_kl,
    warn_unused_kl,
)
from grpo.build.resume import resume_or_start
from grpo.build.tracking import bind_sinks, build_run_info
from grpo.config.binding import resolve_node
from grpo.config.schema import DoctorConfig
from grpo.config.secrets import resolve_without_secrets
from grpo.config.unused_keys import Facts, explain_unused_keys
from grpo.data.order import count_steps
from grpo.data.prompts import LazyPrompts
from grpo.doctor.sink import DoctorSink
from grpo.errors import RunError
from grpo.locate import RunInputs
from grpo.memory.allocator import give_back_freed_memory
from grpo.models.remote_code import has_remote_code
from grpo.parallel import ONE_RANK, Ranks
from grpo.parallel.agreement import check_same
from grpo.report.run.page import write_run_page
from grpo.runs.files import RUNNING
from grpo.runs.interrupt import Interrupt
from grpo.runs.stop import is_stop_requested, is_sweep_job, request_stop
from grpo.runs.summary import Summary, make_relative
from grpo.sweep.pruning import make_prune_check, never_prune
from grpo.tracking import Console, JsonlFiles, Tracker
from grpo.training.ahead import AheadCollector, DelayedPolicy
from grpo.training.checkpoint import Checkpoints
from grpo.training.collect import Collector
from grpo.training.difficulty import measure_difficulty
from grpo.training.loop import Training, TrainingState, train
from grpo.training.sampler import Sampler
from grpo.types import Prompt

log = logging.getLogger(__name__)


def train_from_config(
    cfg: DictConfig, folder: Path, found: RunInputs, ranks: Ranks = ONE_RANK
) -> float | None:
    """Runs one experiment in its folder and returns its objective.

    Raises:
        ConfigError: the run can't start with this config.
        RunError: the run had to stop; `train` says what is saved.
        SystemExit: 130; the run was interrupted and is saved.
    """
    run, state = build_training(cfg, folder, found, ranks)
    give_back_freed_memory()  # of checks and trials; training couldn't use the gaps between
    answer_counts = run.evaluation.answer_counts
    commits = found.find_hub_commits()
    summary = Summary(folder, cfg.objective, run.device, run.total_steps, answer_counts, commits)
    summary.write(RUNNING, state.progress)
    status, error = "failed", "ended from outside"
    try:
        with Interrupt(is_stop_requested) as interrupt:
            status, error = train(run, state, interrupt), ""
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
        for reward in run.collector.sampler.rewards.values():
            reward.close()
        content = summary.write(status, state.progress, error)
        run.tracker.close(status, content)
        if state.progress.step or state.progress.unlogged is None:
            write_report_html(folder)
    print(summary.format_closing(content), flush=True)
    if interrupt.requested and is_sweep_job():
        request_stop()  # stops the sweep's other jobs; this one is saved
    elif status == "interrupted":
        raise SystemExit(130)
    return summary.get_objective(content)


def follow_training(cfg: DictConfig, folder: Path, found: RunInputs, ranks: Ranks) -> None:
    """Takes part in a run as a rank that writes nothing.

    Raises:
        ConfigError, RunError: as `train_from_config`, with the first rank's or its own error.
    """
    run, state = build_training(cfg, folder, found, ranks)
    give_back_freed_memory()
    try:
        with Interrupt() as interrupt:
            train(run, state, interrupt)
    finally:
        for reward in run.collector.sampler.rewards.values():
            reward.close()


def write_report_html(folder: Path) -> None:
    """Writes report.html; if that fails, only logs it, since the run's numbers are on disk."""
    try:
        write_run_page(folder)
    except OSError as error:  # a full disk must not hide why the run ended
        log.warning(
            "report.html could not be written: %s; write it later with grpo report %s",
            error,
            folder,
        )
    except Exception:
        log.exception("report.html could not be made; the run's other files are complete")


def build_training(
    cfg: DictConfig, folder: Path, found: RunInputs, ranks: Ranks
) -> tuple[Training, TrainingState]:
    """Builds a run's parts, those with cheap checks first; returns them and where it starts.

    One function despite its length: this order is the run's, read from top to bottom.
    """
    device = build_device(cfg, folder, ranks)
    rewards = build_rewards(cfg, found)
    objective, advantage = build_objective(cfg), build_advantage(cfg)
    hydra = HydraConfig.get()
    warn_unused_kl(cfg, hydra.overrides.task, hydra.runtime.choices["kl"])
    make_engine = bind_engine(cfg)
    make_sinks = bind_sinks(cfg) if ranks.is_first else []
    formats = [build_prompt_format(part.options, part.key) for part in found.sets]
    ranks.compute_on_first(found.model)  # so that only one rank downloads it
    policy, base = build_policy(cfg, found, device)
    prompts = build_prompts(found, formats, policy.tokenizer)
    check_same(ranks, lambda: {"model": base, "dataset": prompts.compute_fingerprint()})
    policy, longest = fit_to_lengths(cfg, policy, prompts.evaluation, prompts.train)
    copied = objective.kl is not None and cfg.adapter is None
    budget = build_budget(cfg, policy, longest, with_reference=copied, ranks=ranks)
    sharding = build_sharding(cfg, policy, ranks)
    sampled = policy if sharding is None else sharding.whole
    engine = build_engine(make_engine, sampled, cfg.max_new_tokens, budget)
    train_prompts: Sequence[Prompt] = prompts.train
    curriculum = build_curriculum(cfg)
    if curriculum.samples:
        every = prompts.train
        measured = every.list_fitting() if isinstance(every, LazyPrompts) else every
        shares = measure_difficulty(
            folder, measured, engine, objective.sampling, curriculum.samples, ranks
        )
        train_prompts = curriculum.choose(measured, shares)
    order = build_order(train_prompts, found, cfg)

    # The reference is the model as it was loaded, so it is copied before a checkpoint is.
    kl_penalty = build_kl_penalty(cfg, policy, objective, budget, ranks)
    if sharding is not None:
        sharding.divide_weights(kl_penalty.reference)
    steps = count_steps(len(train_prompts), cfg.batch_size, cfg.num_epochs, cfg.max_steps)
    optimizer = build_optimizer(cfg, policy, steps)
    saved = resolve_without_secrets(cfg)
    delayed = DelayedPolicy(policy) if cfg.rollout.get("ahead") else None
    checkpoints = Checkpoints(folder, cfg.checkpoint.keep, saved, ranks, delayed)
    start = resume_or_start(cfg, checkpoints, policy, optimizer, kl_penalty, budget, steps, base)
    info = build_run_info(cfg, folder, start, steps)
    # The sinks that may refuse come first: JsonlFiles puts the run on disk.
    sinks = [make(info=info) for make in make_sinks]
    if ranks.is_first:
        sinks += [JsonlFiles(info), Console(info)]
    if ranks.is_first and cfg.doctor is not None:
        sinks.append(DoctorSink(info, DoctorConfig(**resolve_node(cfg.doctor))))
    log.info(
        "%s in %s: %d steps of %d x %d completions from %d prompts; algorithm %s, %s; on %s",
        info.name, make_relative(folder), steps, cfg.batch_size, cfg.num_generation,
        len(train_prompts), hydra.runtime.choices["algorithm"], format_kl(describe_kl(cfg)),
        device.describe(),
    )  # fmt: skip
    exact = is_exact(cfg, device)
    facts = Facts(exact, steps * count_updates_per_step(cfg), has_remote_code(found.model()))
    for line in explain_unused_keys(cfg, hydra.overrides.task, facts):
        log.warning("%s", line)
    sampler = Sampler(
        engine, rewards, ranks, nullcontext if sharding is None else sharding.gathered
    )
    collector = Collector(
        sampler=sampler,
        prompts=train_prompts,
        order=order,
        sampling=objective.sampling,
        batch_size=cfg.batch_size,
        num_generation=cfg.num_generation,
        resample=cfg.algorithm.resample,
        seed=cfg.seed,
    )
    ahead = None
    if delayed is not None:
        engine = build_engine(make_engine, delayed.model, cfg.max_new_tokens, budget)
        of_delayed = replace(collector, sampler=replace(sampler, engine=engine))
        ahead = AheadCollector(of_delayed, delayed, steps)
    prunes = ranks.is_first and is_sweep_job()
    run = Training(
        policy=policy,
        collector=ahead or collector,
        kl_penalty=kl_penalty,
        optimizer=optimizer,
        objective=objective,
        advantage=advantage,
        evaluation=build_evaluation(cfg, sampler, prompts.evaluation, train_prompts),
        tracker=Tracker(sinks),
        checkpoints=checkpoints,
        device=device,
        budget=budget,
        seed=cfg.seed,
        total_steps=steps,
        eval_every=cfg.eval.every,
        checkpoint_every=cfg.checkpoint.every,
        log_prompts=cfg.log_prompts,
        should_prune=make_prune_check(folder) if prunes else never_prune,
        ranks=ranks,
    )
    return run, TrainingState(start)
