"""What the tokens of a forward pass see of each other, and how a layer is told.

Shape letters beside the usual ones: H heads, K heads of keys and values (H = K·r), width d.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig

ATTENTION_NAME = "grpo_tree"  # under which transformers finds `attend`


@dataclass(frozen=True)
class AttentionScoring:
    """How a layer scores a key."""

    scale: float
    window: int | None = None  # it sees this many tokens, itself among them
    softcap: float | None = None  # scores go through cap · tanh(score / cap)

    def apply(self, scores: Tensor) -> Tensor:
        """From query · key · scale."""
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap


class AttentionPlan(Protocol):
    """What the tokens of a forward pass see of each other, and of what came before."""

    def attend(
        self,
        layer: int,
        queries_HTd: Tensor,
        keys_KTd: Tensor,
        values_KTd: Tensor,
        scoring: AttentionScoring,
    ) -> Tensor:
        """[T, H, d] what each token takes from those it sees."""


@contextmanager
def attention_as(config: PreTrainedConfig, name: str) -> Iterator[None]:
    """Within it, the layers with this config compute attention the way of that name."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
