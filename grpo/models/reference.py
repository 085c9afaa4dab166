"""What the policy is kept near: a frozen copy of it, or itself with its adapter switched off."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from grpo.models.forward import Completions
from grpo.models.head import Features
from grpo.models.load import LanguageModel, frozen_copy


class Reference:
    """A model that is read and never trained; it may be moved toward the policy now and then."""

    def __init__(
        self, model: LanguageModel, within: Callable[[], AbstractContextManager[object]]
    ) -> None:
        """within: what has to hold while the model is read as the reference."""
        self.model, self.within = model, within

    @torch.no_grad()
    def features(self, batch: Completions) -> Features:
        """What the reference knows of each completion token."""
        with self.within():
            return self.model.features(batch)

    @torch.no_grad()
    def move(self, policy: LanguageModel, share: float) -> None:
        """Moves every weight this share of the way to the policy's: 1 copies it (2404.09656)."""
        for own, weight in zip(self._weights(), policy.model.parameters(), strict=True):
            own.lerp_(weight, share)

    def state(self) -> dict[str, Tensor]:
        """The weights, where they are no longer those that training began with."""
        return dict(self.model.model.named_parameters())

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        for name, weight in self.model.model.named_parameters():
            weight.copy_(state[name])

    def _weights(self) -> list[Tensor]:
        return list(self.model.model.parameters())


def frozen_reference(policy: LanguageModel) -> Reference:
    """The policy as it is now."""
    return Reference(frozen_copy(policy), nullcontext)
