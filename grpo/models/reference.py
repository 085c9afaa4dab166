"""The reference that the policy stays near: a frozen copy, or the policy without its adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

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
    """A model that is never trained, but may be moved toward the policy."""

    def __init__(
        self,
        model: LanguageModel,
        activated: Callable[[], AbstractContextManager[object]],
        pair_weights: Callable[[], WeightPairs],
    ) -> None:
        """
        Args:
            activated: returns a context in which the model computes as the reference.
            pair_weights: returns each movable weight of the reference with the policy's weight.
        """
        self.model, self.activated, self.pair_weights = model, activated, pair_weights

    @property
    def weight_pairs(self) -> WeightPairs:
        """Each movable weight of the reference, with the policy's weight."""
        return self.pair_weights()

    @torch.no_grad()
    def compute_features(self, batch: Completions) -> Features:
        """Runs a forward pass of the reference and returns the features of completion tokens."""
        with self.activated():
            return self.model.compute_features(batch)

    @torch.no_grad()
    def move(self, share: float) -> None:
        """Moves each weight by this share toward the policy's: 1 copies it (2404.09656)."""
        for reference_weight, policy_weight in self.weight_pairs:
            reference_weight.lerp_(policy_weight, share)

    def state(self) -> list[Tensor]:
        """Returns the weights that can be moved, for a checkpoint."""
        return [reference_weight.detach() for reference_weight, _ in self.weight_pairs]

    @torch.no_grad()
    def load_state(self, state: Sequence[Tensor]) -> None:
        """Copies the weights that `state` returned."""
        for (reference_weight, _), saved_weight in zip(self.weight_pairs, state, strict=True):
            if saved_weight is not reference_weight:  # a divided one is read in place
                reference_weight.copy_(saved_weight)


def make_reference(policy: LanguageModel, moves: bool) -> Reference:
    """Returns the policy's current weights as a reference.

    It is a copy of the policy; if the policy has an adapter, it is the same model without it.

    Args:
        moves: whether the reference will be moved; if the policy has an adapter, the reference is
            then a second adapter.
    """
    if not has_adapter(policy.model):
        in_fp32 = moves or policy.device.autocast_dtype is None
        copied = copy_frozen(policy, in_fp32)
        pairs = partial(pair_all_weights, copied.model, policy.model) if in_fp32 else list
        return Reference(copied, nullcontext, pairs)
    if not moves:
        return Reference(policy, partial(adapters_off, policy.model), list)
    add_reference_adapter(policy.model)
    activated = partial(adapter_active, policy.model, REFERENCE_ADAPTER)
    return Reference(policy, activated, partial(pair_adapter_weights, policy.model))


def pair_all_weights(reference: nn.Module, policy: nn.Module) -> WeightPairs:
    return list(zip(reference.parameters(), policy.parameters(), strict=True))
