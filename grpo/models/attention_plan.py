"""The interface that decides which tokens attend to which, and a switch of the attention code.

Shape letters beside the usual ones: H query heads, K key-value heads (H = K·r), width d.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig

ATTENTION_NAME = "grpo_tree"  # the name under which `attend` is registered with transformers


@dataclass(frozen=True)
class AttentionScoring:
    """How a layer computes attention scores from queries and keys."""

    scale: float
    window: int | None = None  # a token attends to the last `window` tokens, itself included
    softcap: float | None = None  # scores become cap · tanh(score / cap)

    def apply(self, scores: Tensor) -> Tensor:
        """Applies the soft cap, if there is one, to query · key · scale."""
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap


class AttentionPlan(Protocol):
    """Decides to which tokens of a forward pass, and of earlier ones, each token attends."""

    def attend(
        self,
        layer: int,
        queries_HTd: Tensor,
        keys_KTd: Tensor,
        values_KTd: Tensor,
        scoring: AttentionScoring,
    ) -> Tensor:
        """Returns the attention output [T, H, d] of a layer.

        Args:
            layer: the layer's number in the model.
            queries_HTd, keys_KTd, values_KTd: of the T tokens of this forward pass.
        """


@contextmanager
def attention_as(config: PreTrainedConfig, name: str) -> Iterator[None]:
    """Within it, layers with this config use the attention registered under that name."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
