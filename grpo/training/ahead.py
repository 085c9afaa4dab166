"""Samples and scores the next step's completions while a step is trained.

They come from the policy as it was before that step's update. Importance weights correct for it:
the old policy of a step's ratios is always the present one (`update.score_old_policy`). Which
weights a completion was sampled from doesn't depend on how long anything takes, and a checkpoint
holds them, so a resumed run has the same numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor, nn

from grpo.models.adapter import copy_model
from grpo.models.head import Head
from grpo.models.load import LanguageModel
from grpo.training.collect import Batch, Collector
from grpo.training.sampler import Sampler

log = logging.getLogger(__name__)


class DelayedPolicy:
    """A copy of the policy's weights of one step ago; frozen weights are shared with it."""

    def __init__(self, policy: LanguageModel) -> None:
        copied = copy_model(policy.model, copy_trained)
        own = dict(copied.named_parameters())
        self.weights = {  # the copy's, the policy's
            name: (own[name], present)
            for name, present in policy.model.named_parameters()
            if present.requires_grad
        }
        self.model = replace(policy, model=copied, head=Head(copied))
        self.is_behind = False  # the policy has other weights now
        # The step whose completions come from these weights; None before the first.
        self.next_step: int | None = None

    @torch.no_grad()
    def follow_policy(self) -> None:
        """Takes over the policy's present weights."""
        for own, present in self.weights.values():
            own.copy_(present)
        self.is_behind = False

    def belongs_after(self, step: int) -> bool:
        """Returns whether a run that is resumed after this step would need these weights."""
        return self.next_step in (None, step + 1)

    def state(self) -> dict[str, Tensor]:
        """Returns the copied weights, for a checkpoint."""
        return {name: own.detach() for name, (own, _) in self.weights.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor] | None) -> None:
        """Loads the weights that `state` returned; None, of a run without them, takes present."""
        if state is None:
            self.follow_policy()
            return
        for name, (own, _) in self.weights.items():
            own.copy_(state[name])
        self.is_behind = any(not torch.equal(own, now) for own, now in self.weights.values())


def copy_trained(weight: nn.Parameter) -> nn.Parameter:
    """Returns a copy of a trained weight; a frozen one itself."""
    if not weight.requires_grad:
        return weight
    return nn.Parameter(weight.detach().clone(), requires_grad=False)


class AheadCollector:
    """Collects as `Collector`, one step ahead, in a thread of its own."""

    def __init__(self, collector: Collector, delayed: DelayedPolicy, last_step: int) -> None:
        """
        Args:
            collector: samples from the delayed policy.
            last_step: after which nothing is sampled.
        """
        self.collector, self.delayed, self.last_step = collector, delayed, last_step
        self.executor = ThreadPoolExecutor(1, "rollout ahead")
        self.coming: tuple[int, Future[Batch]] | None = None  # a step, and its completions

    @property
    def sampler(self) -> Sampler:
        """What samples and scores."""
        return self.collector.sampler

    def collect(self, step: int) -> Batch:
        """Implements `Collector.collect`, and starts to collect the step after it."""
        if self.coming is None:  # the first step, or the first after a resume
            self._start(step)
        assert self.coming is not None
        expected, future = self.coming
        assert expected == step
        self.coming = None
        batch = future.result()
        if self.delayed.is_behind:
            batch = replace(batch, rollout=replace(batch.rollout, exact_logprobs=False))
        self.delayed.follow_policy()
        self.delayed.next_step = step + 1
        if step < self.last_step:
            self._start(step + 1)
        self.delayed.is_behind = True  # once this step has updated the policy
        return batch

    def _start(self, step: int) -> None:
        self.coming = step, self.executor.submit(self.collector.collect, step)

    def finish(self) -> None:
        """Waits for the completions that no step will use."""
        self.executor.shutdown()
        if self.coming is not None and (error := self.coming[1].exception()) is not None:
            log.warning("step %d, not trained: %s", self.coming[0], error)
        self.coming = None
