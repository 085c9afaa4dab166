"""Which of a model's parts are computed the fast way: those that are recognised, and tried.

A module counts as one of the kind that is written out in `layer.py`, `modules.py` and `linear.py`
if it has its parts and gives its numbers; all others compute as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from grpo.models.attention_plan import ATTENTION_NAME, AttentionScoring, attention_as
from grpo.models.cpu.layer import DecodeForward, DecoderLayer, RotationCache, TrainingForward
from grpo.models.cpu.linear import (
    computed_as,
    find_linear_layers,
    make_linear_forwards,
    make_packed_forwards,
    suits_onednn,
)
from grpo.models.cpu.modules import (
    looks_like_norm,
    make_embedding_forwards,
    make_mlp_forwards,
    make_norm_forwards,
)
from grpo.models.cpu.tree_attention import attend_split
from grpo.models.tree import Tree

LAYER_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def dispatch_on_plan(module: Any, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A layer's forward that is written out where a tree is read, and the class's own elsewhere."""

    def chosen(hidden: Tensor, **named: Any) -> Tensor:
        if "plan" not in named:
            own: Tensor = type(module).forward(module, hidden, **named)
            return own
        position_embeddings = named["position_embeddings"]
        return forward(hidden, plan=named["plan"], position_embeddings=position_embeddings)

    return chosen


_scorings: WeakKeyDictionary[nn.Module, AttentionScoring | None] = WeakKeyDictionary()


def find_supported_layers(model: nn.Module) -> list[DecoderLayer]:
    """The model's layers that can be computed here."""
    found = []
    for module in filter(has_supported_parts, model.modules()):
        if module not in _scorings:
            _scorings[module] = find_scoring(module)
        how = _scorings[module]
        if how is not None:
            found.append(DecoderLayer(module, how))
    return found


def has_supported_parts(module: Any) -> bool:
    """Whether it has the parts of such a layer, all of them plain."""
    if {name for name, _ in module.named_children()} != LAYER_PARTS:
        return False
    attention, block = module.self_attn, module.mlp
    if {name for name, _ in attention.named_children()} != ATTENTION_PARTS:
        return False
    if {name for name, _ in block.named_children()} != MLP_PARTS:
        return False
    linear = [getattr(attention, name) for name in sorted(ATTENTION_PARTS)]
    linear += [block.gate_proj, block.up_proj, block.down_proj]
    return (
        looks_like_norm(module.input_layernorm)
        and looks_like_norm(module.post_attention_layernorm)
        and all(type(part) is nn.Linear and suits_onednn(part.weight) for part in linear)
        and all(part.bias is None for part in (attention.o_proj, *linear[4:]))
        and all(hasattr(attention, name) for name in ("head_dim", "layer_idx", "config"))
    )


class RecordingPlan:
    """A plan that notes how a layer scores its keys, and scores them all alike."""

    def __init__(self, tree: Tree) -> None:
        self.tree, self.scoring = tree, AttentionScoring(0.0)

    def attend(
        self,
        layer: int,
        queries_HTd: Tensor,
        keys_KTd: Tensor,
        values_KTd: Tensor,
        scoring: AttentionScoring,
    ) -> Tensor:
        """As `Plan.attend` says."""
        self.scoring = scoring
        return attend_split(queries_HTd, keys_KTd, values_KTd, self.tree, scoring.scale)


@torch.no_grad()
def find_scoring(module: Any) -> AttentionScoring | None:
    """How a layer scores its keys, if what is written here gives its numbers; else None.

    Tried on random numbers: a layer may leave out its positions, or scale what it adds, and
    nothing but its code says so.
    """
    generator = torch.Generator().manual_seed(0)
    attention = module.self_attn
    x = torch.randn(1, 4, attention.q_proj.in_features, generator=generator)
    angles = torch.rand(1, 4, attention.head_dim // 2, generator=generator).repeat(1, 1, 2)
    positions = (angles.cos(), angles.sin())
    plan = RecordingPlan(Tree((4,), ()))
    try:
        with attention_as(attention.config, ATTENTION_NAME):
            own = type(module).forward(module, x, position_embeddings=positions, plan=plan)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None  # it wants something else than such layers do
    forward = TrainingForward(DecoderLayer(module, plan.scoring), RotationCache())
    written = forward(x, plan=plan, position_embeddings=positions)
    same = isinstance(own, Tensor) and torch.allclose(own, written, rtol=1e-4, atol=1e-4)
    return plan.scoring if same else None


def fast_forward_pass(model: nn.Module) -> AbstractContextManager[None]:
    """Within it, a forward pass keeps little for its backward, and its products are fast."""
    rotations = RotationCache()
    whole = {
        x.module: dispatch_on_plan(x.module, TrainingForward(x, rotations))
        for x in find_supported_layers(model)
    }
    return computed_as(
        {
            **make_linear_forwards(model),
            **make_norm_forwards(model),
            **make_mlp_forwards(model),
            **make_embedding_forwards(model),
            **whole,
        }
    )


def fast_decoding(model: nn.Module, rows: int) -> AbstractContextManager[None]:
    """Within it, a forward pass of few tokens is fast, and without gradient.

    rows: how many tokens there will mostly be. The weights must not change meanwhile.
    """
    whole, rotations = find_supported_layers(model), RotationCache()
    inside = {part for layer in whole for part in layer.module.modules()}
    rest = [part for part in find_linear_layers(model) if part not in inside]
    few = {x.module: dispatch_on_plan(x.module, DecodeForward(x, rotations, rows)) for x in whole}
    return computed_as({**make_packed_forwards(rows, rest), **make_norm_forwards(model), **few})
