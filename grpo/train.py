"""The loop: prompts, rollout, score, advantage, loss, update, log."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from grpo.checkpoint import Checkpoints, Progress
from grpo.data.order import batch_indices
from grpo.device import Device
from grpo.errors import RunError
from grpo.evaluate import Evaluation
from grpo.interrupt import Interrupt
from grpo.models.load import LanguageModel
from grpo.optim import Optimizer
from grpo.rewards import WeightedReward, score
from grpo.rollout import Engine
from grpo.tracking.tracker import Tracker, completion_rows
from grpo.types import Prompt
from grpo.update import Objective, update


@dataclass(frozen=True)
class Training:
    """Everything the loop works with, built and checked."""

    policy: LanguageModel
    reference: LanguageModel | None
    engine: Engine
    optimizer: Optimizer
    objective: Objective
    advantage: Callable[[Tensor], Tensor]  # rewards [B, G] -> advantages [B, G]
    rewards: Mapping[str, WeightedReward]
    prompts: Sequence[Prompt]
    evaluation: Evaluation
    tracker: Tracker
    checkpoints: Checkpoints
    device: Device
    batch_size: int
    num_generation: int
    temperature: float
    token_budget: int
    seed: int
    total_steps: int
    eval_every: int
    checkpoint_every: int
    log_prompts: int


@dataclass
class Standing:
    """How far a run has come, known however it ends."""

    progress: Progress


def train(run: Training, standing: Standing, interrupt: Interrupt) -> None:
    """Trains from where it stands to the last step, or to where it is interrupted; then saves.

    Raises:
        RunError: a reward failed; all steps done before are in a checkpoint.
    """
    clock = Clock(standing.progress.seconds)

    def reached(step: int, unlogged: dict[str, float] | None) -> None:
        standing.progress = replace(
            standing.progress, step=step, unlogged=unlogged, seconds=clock.seconds()
        )

    def save() -> None:
        run.checkpoints.save(run.policy, run.optimizer, standing.progress)

    start, owed = standing.progress.step, standing.progress.unlogged
    try:
        if owed is not None:  # the evaluation before training, or one that a failure cut short
            run.tracker.log(start, owed | run.evaluation.run())
            reached(start, None)
        for step in range(start + 1, run.total_steps + 1):
            metrics = train_step(run, step)
            reached(step, metrics)
            if step == run.total_steps or due(step, run.eval_every):
                metrics = metrics | run.evaluation.run()
            run.tracker.log(step, metrics)
            reached(step, None)
            last = step == run.total_steps or interrupt.requested
            if last or due(step, run.checkpoint_every):
                save()
            if last:
                break
    except RunError:
        save()
        raise


def train_step(run: Training, step: int) -> dict[str, float]:
    """One step of GRPO, and what there is to say about it. The step number seeds what is random."""
    clock = Clock()
    indices = batch_indices(step, run.batch_size, len(run.prompts), run.seed)
    prompts = [run.prompts[i] for i in indices]

    rollout = run.engine.generate(
        prompts, run.num_generation, run.temperature, seed=run.seed * 1_000_003 + step
    )
    run.device.synchronize()
    rollout_seconds = clock.lap()

    scores = score(rollout, run.rewards)
    advantages_BG = run.advantage(scores.total_BG)
    reward_seconds = clock.lap()

    stats = update(
        run.policy,
        run.reference,
        run.optimizer,
        run.objective,
        rollout,
        advantages_BG,
        run.token_budget,
    )
    run.device.synchronize()
    update_seconds = clock.lap()

    run.tracker.completions(completion_rows(step, rollout, scores, advantages_BG, run.log_prompts))
    seconds = clock.seconds()
    return {
        **stats,
        **scores.metrics(),
        **rollout.metrics(),
        "time/rollout": rollout_seconds,
        "time/reward": reward_seconds,
        "time/update": update_seconds,
        "time/step": seconds,
        "perf/completion_tokens_per_second": int(rollout.lengths_N.sum()) / seconds,
        "perf/samples_per_second": len(rollout.texts) / seconds,
        "memory/peak_gb": run.device.peak_gb(),
    }


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class Clock:
    """Seconds since it was made, plus those before; and since the last lap."""

    def __init__(self, before: float = 0.0) -> None:
        self.started = self.lapped = time.perf_counter()
        self.before = before

    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.started

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self.lapped = now - self.lapped, now
        return seconds
