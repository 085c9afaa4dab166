"""The loop: prompts, rollout, score, advantage, loss, update, log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from grpo.device import Device
from grpo.errors import RunError
from grpo.memory.budget import Budget
from grpo.models.load import LanguageModel
from grpo.runs.interrupt import Interrupt
from grpo.runs.progress import Progress
from grpo.seeds import stream_seed
from grpo.tracking.tokens import with_tokens
from grpo.tracking.tracker import Tracker, answer_rows, completion_rows
from grpo.training.checkpoint import Checkpoints
from grpo.training.clock import Clock
from grpo.training.collect import Collector
from grpo.training.evaluation import Evaluation, metrics_of
from grpo.training.kl_penalty import Pull
from grpo.training.loss import Learned, Objective
from grpo.training.optimizer import Optimizer
from grpo.training.update import old_policy, update

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """Everything the loop works with, built and checked."""

    policy: LanguageModel
    collector: Collector
    pull: Pull
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
    hopeless: Callable[[int, dict[str, float]], bool]  # a step and its metrics


@dataclass
class Standing:
    """How far a run has come, known however it ends."""

    progress: Progress


def train(run: Training, standing: Standing, interrupt: Interrupt) -> str:
    """Trains from where it stands to the last step, or to where it is stopped; then saves.

    Returns:
        finished, pruned (a search has given it up) or interrupted.

    Raises:
        RunError: with the step where it happened. All steps done before are in a checkpoint, unless
            that step had updated the policy already.
    """
    clock = Clock(standing.progress.seconds)

    updates = run.optimizer.steps_done  # when the last step was done

    def reached(step: int, unlogged: dict[str, float] | None) -> None:
        nonlocal updates
        updates = run.optimizer.steps_done
        standing.progress = replace(
            standing.progress, step=step, unlogged=unlogged, seconds=clock.seconds()
        )

    def save() -> None:
        run.checkpoints.save(run.policy, run.optimizer, run.pull, run.budget, standing.progress)

    def save_if_whole() -> None:
        taken = run.optimizer.steps_done - updates
        if taken:  # these weights are no step's: resumed, the step would be done twice
            log.warning(
                "step %d ended after %d of %d updates, so it is not saved; resume goes on from the "
                "newest checkpoint.",
                standing.progress.step + 1, taken, run.objective.updates,
            )  # fmt: skip
        else:
            save()

    start, owed = standing.progress.step, standing.progress.unlogged
    step = start
    try:
        if owed is not None:  # the evaluation before training, or one that a failure cut short
            run.tracker.log(start, owed | evaluated(run, start))
            reached(start, None)
        for step in range(start + 1, run.total_steps + 1):
            metrics = train_step(run, step)
            reached(step, metrics)
            if step == run.total_steps or due(step, run.eval_every):
                metrics = metrics | evaluated(run, step)
            run.tracker.log(step, metrics)
            reached(step, None)
            done = step == run.total_steps
            pruned = run.hopeless(step, metrics) and not done
            last = done or pruned or interrupt.requested
            if last or due(step, run.checkpoint_every):
                save()
            if last:
                return "finished" if done else "pruned" if pruned else "interrupted"
    except RunError as error:
        save_if_whole()
        raise RunError(f"step {step}: {error}") from error
    return "finished"  # there was nothing left to do


def train_step(run: Training, step: int) -> dict[str, float]:
    """One step of GRPO, and what there is to say about it. The step number seeds what is random."""
    clock = Clock()
    batch = run.collector.collect(step)
    clock.lap()
    pulled = run.pull.read(batch.rollout)
    old = old_policy(run.policy, run.objective, batch.rollout, run.budget.computed)
    parts_RBG, weights_R = batch.scores.stacked()
    penalty = {}  # of a KL in the reward
    if pulled.divergence_BG is not None:
        penalty["penalty_BG"] = pulled.weight * pulled.divergence_BG.cpu()
    advantages_BG = run.advantage(parts_RBG, weights_R, **penalty)
    updated = update(
        run.policy,
        run.pull.reference,
        run.optimizer,
        run.objective,
        batch.rollout,
        Learned(
            advantages_BG.flatten().to(run.device.torch_device),
            old,
            pulled.reference_NC,
            0.0 if pulled.divergence_BG is not None else pulled.weight,
            batch.scores.total_BG.isnan().flatten().to(run.device.torch_device),
        ),
        run.budget.computed,
        seed=stream_seed(run.seed, step),
    )
    stats = updated.metrics
    stats |= run.pull.follow(step, stats, len(batch.rollout.texts))
    run.device.synchronize()
    update_seconds = clock.lap()

    rows = completion_rows(step, batch.rollout, batch.scores, advantages_BG, run.log_prompts)
    spelled = with_tokens(rows, batch.rollout, updated.log_ratio_NC, run.policy.decoder)
    run.tracker.completions(spelled)
    run.tracker.distributions(
        step,
        {
            "histogram/reward": batch.scores.total_BG,
            "histogram/advantage": advantages_BG,
            "histogram/length": batch.rollout.lengths_N,
            "histogram/ratio": updated.ratios_T,
        },
    )
    seconds = clock.seconds()
    return {
        **stats,
        **batch.metrics,
        "time/update": update_seconds,
        "time/step": seconds,
        "perf/completion_tokens_per_second": batch.tokens / seconds,
        "perf/samples_per_second": batch.completions / seconds,
        "memory/peak_gb": run.device.peak_gb(),
    }


def evaluated(run: Training, step: int) -> dict[str, float]:
    """Evaluates the policy; what it answered goes to the tracker."""
    greedy, sampled = run.evaluation.answer()
    if greedy is not None:
        run.tracker.answers(step, answer_rows(greedy.rollout, greedy.scores))
    return {**metrics_of(greedy, sampled), "eval/overlap": run.evaluation.overlap}


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
