"""What the policy is kept near: a frozen copy of it, or itself with its adapter switched off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from grpo.models.adapter import (
    REFERENCE_ADAPTER,
    adapter_active,
    adapters_off,
    add_reference_adapter,
    has_adapter,
    pair_adapter_weights,
)
from grpo.models.forward import Completions
from grpo.models.head import Features
from grpo.models.load import LanguageModel, copy_frozen

WeightPairs = Sequence[tuple[Tensor, Tensor]]


class Reference:
    """A model that is read and never trained; it may be moved toward the policy now and then."""

    def __init__(
        self,
        model: LanguageModel,
        activated: Callable[[], AbstractContextManager[object]],
        weight_pairs: WeightPairs,
    ) -> None:
        """
        Args:
            within: what has to hold while the model is read as the reference.
            pairs: each of its weights that can be moved, with the policy's.
        """
        self.model, self.activated, self.weight_pairs = model, activated, weight_pairs

    @torch.no_grad()
    def compute_features(self, batch: Completions) -> Features:
        """What the reference knows of each completion token."""
        with self.activated():
            return self.model.compute_features(batch)

    @torch.no_grad()
    def move(self, share: float) -> None:
        """Moves every weight this share of the way to the policy's: 1 copies it (2404.09656)."""
        for own, weight in self.weight_pairs:
            own.lerp_(weight, share)

    def state(self) -> list[Tensor]:
        """The weights that can be moved."""
        return [own.detach() for own, _ in self.weight_pairs]

    @torch.no_grad()
    def load_state(self, state: Sequence[Tensor]) -> None:
        for (own, _), weight in zip(self.weight_pairs, state, strict=True):
            own.copy_(weight)


def make_reference(policy: LanguageModel, moves: bool) -> Reference:
    """The policy as it is now: a copy, or under an adapter the model itself, without it.

    moves: it will be moved, so under an adapter it is an adapter too.
    """
    if not has_adapter(policy.model):
        in_fp32 = moves or policy.device.autocast_dtype is None
        copied = copy_frozen(policy, in_fp32)
        own, weights = copied.model.parameters(), policy.model.parameters()
        pairs = list(zip(own, weights, strict=True)) if in_fp32 else []
        return Reference(copied, nullcontext, pairs)
    if not moves:
        return Reference(policy, partial(adapters_off, policy.model), [])
    add_reference_adapter(policy.model)
    within = partial(adapter_active, policy.model, REFERENCE_ADAPTER)
    return Reference(policy, within, pair_adapter_weights(policy.model))
