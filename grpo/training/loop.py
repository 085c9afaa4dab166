"""The training loop: prompts, rollout, scores, advantages, loss, update, log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from grpo.device import Device
from grpo.errors import RunError
from grpo.memory.budget import Budget
from grpo.models.load import LanguageModel
from grpo.parallel import ONE_RANK, Ranks
from grpo.runs.interrupt import Interrupt
from grpo.runs.progress import Progress
from grpo.seeds import derive_seed
from grpo.tracking.tokens import add_token_fields
from grpo.tracking.tracker import Tracker, make_answer_rows, make_completion_rows
from grpo.training.ahead import AheadCollector
from grpo.training.checkpoint import Checkpoints
from grpo.training.clock import Clock
from grpo.training.collect import Collector
from grpo.training.evaluation import Evaluation, evaluation_metrics
from grpo.training.kl_penalty import NoKL
from grpo.training.loss import Objective, UpdateInputs
from grpo.training.optimizer import Optimizer
from grpo.training.update import score_old_policy, update_policy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """Everything that the loop needs, built and checked."""

    policy: LanguageModel
    collector: Collector | AheadCollector
    kl_penalty: NoKL
    optimizer: Optimizer
    objective: Objective
    advantage: Callable[..., Tensor]  # rewards [R, B, G], weights [R], penalty_BG if any -> [B, G]
    evaluation: Evaluation
    tracker: Tracker
    checkpoints: Checkpoints
    device: Device
    budget: Budget
    seed: int
    total_steps: int
    eval_every: int
    checkpoint_every: int
    log_prompts: int
    should_prune: Callable[[int, dict[str, float]], bool]  # takes a step and its metrics
    ranks: Ranks = ONE_RANK


@dataclass
class TrainingState:
    """How far a run has come; the caller can read it even when `train` raises."""

    progress: Progress


def train(run: Training, state: TrainingState, interrupt: Interrupt) -> str:
    """Trains from the present step to the last one, or until it is stopped; then saves.

    Returns:
        finished, pruned (the search stopped it early) or interrupted.

    Raises:
        RunError: names the step that failed. A checkpoint holds all steps before it, unless that
            step had already updated the policy.
    """
    clock = Clock(state.progress.seconds)

    recorded_updates = run.optimizer.steps_done  # at the end of the last step

    def record_progress(step: int, unlogged: dict[str, float] | None) -> None:
        nonlocal recorded_updates
        recorded_updates = run.optimizer.steps_done
        state.progress = replace(
            state.progress, step=step, unlogged=unlogged, seconds=clock.seconds()
        )

    def save() -> None:
        run.checkpoints.save(run.policy, run.optimizer, run.kl_penalty, run.budget, state.progress)

    def save_if_between_steps() -> None:
        updates = run.optimizer.steps_done - recorded_updates
        delayed = run.checkpoints.delayed
        if run.policy.is_sharded and run.ranks.is_broken:
            log.warning(
                "step %d is not saved, since the weights are divided among processes, of which one "
                "is lost; resume continues from the newest checkpoint.", state.progress.step,
            )  # fmt: skip
        elif delayed is not None and not delayed.belongs_after(state.progress.step):
            log.warning(
                "step %d is not saved: its next completions came from the weights before it; "
                "resume continues from the newest checkpoint.", state.progress.step,
            )  # fmt: skip
        elif updates:  # a run resumed from these weights would repeat this step's updates
            log.warning(
                "step %d ended after %d of %d updates, so it is not saved; resume continues from "
                "the newest checkpoint.",
                state.progress.step + 1, updates, run.objective.updates,
            )  # fmt: skip
        else:
            save()

    start, unlogged_metrics = state.progress.step, state.progress.unlogged
    step = start
    try:
        # Before training, or after a failure between a step and its log line.
        if unlogged_metrics is not None:
            run.tracker.log(start, unlogged_metrics | evaluate_policy(run, start))
            record_progress(start, None)
        for step in range(start + 1, run.total_steps + 1):
            metrics = train_step(run, step)
            record_progress(step, metrics)
            if step == run.total_steps or is_due(step, run.eval_every):
                metrics = metrics | evaluate_policy(run, step)
            run.tracker.log(step, metrics)
            record_progress(step, None)
            done = step == run.total_steps
            pruned, interrupted = decide_to_stop(run, step, metrics, interrupt)
            pruned = pruned and not done
            last = done or pruned or interrupted
            if last or is_due(step, run.checkpoint_every):
                save()
            if last:
                return "finished" if done else "pruned" if pruned else "interrupted"
    except RunError as error:
        save_if_between_steps()
        raise RunError(f"step {step}: {error}") from error
    finally:
        run.collector.finish()
    return "finished"  # no steps were left


def train_step(run: Training, step: int) -> dict[str, float]:
    """Runs one step of GRPO and returns its metrics. The step number seeds all randomness."""
    clock = Clock()
    batch = run.collector.collect(step)
    clock.lap()
    reference_scores = run.kl_penalty.score(batch.rollout)
    old = score_old_policy(
        run.policy, run.objective, batch.rollout, run.budget.forward_limit, run.ranks
    )
    parts_RBG, weights_R = batch.scores.stack_parts()
    penalty = {}  # for a KL in the reward
    if reference_scores.divergence_BG is not None:
        penalty["penalty_BG"] = reference_scores.weight * reference_scores.divergence_BG.cpu()
    advantages_BG = run.advantage(parts_RBG, weights_R, **penalty)
    result = update_policy(
        run.policy,
        run.kl_penalty.reference,
        run.optimizer,
        run.objective,
        batch.rollout,
        UpdateInputs(
            advantages_BG.flatten().to(run.device.torch_device),
            old,
            reference_scores.reference_NC,
            0.0 if reference_scores.divergence_BG is not None else reference_scores.weight,
            batch.scores.total_BG.isnan().flatten().to(run.device.torch_device),
        ),
        run.budget.forward_limit,
        seed=derive_seed(run.seed, step),
        ranks=run.ranks,
    )
    stats = result.metrics
    stats |= run.kl_penalty.after_update(step, stats, len(batch.rollout.texts))
    run.device.synchronize()
    update_seconds = clock.lap()

    rows = make_completion_rows(step, batch.rollout, batch.scores, advantages_BG, run.log_prompts)
    rows = add_token_fields(rows, batch.rollout, result.log_ratio_NC, run.policy.decoder)
    run.tracker.log_completions(rows)
    run.tracker.log_distributions(
        step,
        {
            "histogram/reward": batch.scores.total_BG,
            "histogram/advantage": advantages_BG,
            "histogram/length": batch.rollout.lengths_N,
            "histogram/ratio": result.ratios_T,
        },
    )
    seconds = clock.seconds()
    return {
        **stats,
        **batch.metrics,
        "time/update": update_seconds,
        "time/step": seconds,
        "perf/completion_tokens_per_second": batch.sampled_tokens / seconds,
        "perf/samples_per_second": batch.sampled_completions / seconds,
        "memory/peak_gb": max(run.ranks.gather(run.device.measure_peak_gb)),
    }


def decide_to_stop(
    run: Training, step: int, metrics: dict[str, float], interrupt: Interrupt
) -> tuple[bool, bool]:
    """Returns whether the search stops this run, which the first rank knows, or a signal does."""
    pruned = run.ranks.compute_on_first(lambda: run.should_prune(step, metrics))
    return pruned, any(run.ranks.gather(lambda: interrupt.requested))


def evaluate_policy(run: Training, step: int) -> dict[str, float]:
    """Evaluates the policy, logs the greedy answers and returns the metrics."""
    greedy, sampled = run.evaluation.evaluate()
    if greedy is not None:
        run.tracker.log_answers(step, make_answer_rows(greedy.rollout, greedy.scores))
    return {**evaluation_metrics(greedy, sampled), "eval/overlap": run.evaluation.overlap}


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
