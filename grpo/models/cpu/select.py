"""Selects the modules of a model that are computed by faster code on a CPU.

A module is computed by `layer.py`, `modules.py` or `linear.py` if it has the expected parts and
gives the same numbers in a trial; all others compute as usual.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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
    convert_to_fp32,
    looks_like_norm,
    make_embedding_forwards,
    make_mlp_forwards,
    make_norm_forwards,
)
from grpo.models.cpu.tree_attention import attend_split
from grpo.models.sharded import is_sharded
from grpo.models.tree import Tree

LAYER_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def dispatch_on_plan(module: Any, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns a forward that calls `forward` with an attention plan, or the class's own without."""

    def dispatch(hidden: Tensor, **named: Any) -> Tensor:
        if "plan" not in named:
            output: Tensor = type(module).forward(module, hidden, **named)
            return output
        position_embeddings = named["position_embeddings"]
        return forward(hidden, plan=named["plan"], position_embeddings=position_embeddings)

    return dispatch


_scorings: WeakKeyDictionary[nn.Module, AttentionScoring | None] = WeakKeyDictionary()


def find_supported_layers(model: nn.Module) -> list[DecoderLayer]:
    """Returns the model's decoder layers that `layer.py` can compute."""
    layers = []
    for module in filter(has_supported_parts, model.modules()):
        if module not in _scorings:
            _scorings[module] = find_scoring(module)
        scoring = _scorings[module]
        if scoring is not None:
            layers.append(DecoderLayer(module, scoring))
    return layers


def has_supported_parts(module: Any) -> bool:
    """Returns whether a module has exactly the parts of a Llama layer, all of them plain."""
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
    """An attention plan that records a layer's scoring, and ignores its window and soft cap."""

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
        """Implements `AttentionPlan.attend`."""
        self.scoring = scoring
        return attend_split(queries_HTd, keys_KTd, values_KTd, self.tree, scoring.scale)


@torch.no_grad()
def find_scoring(module: Any) -> AttentionScoring | None:
    """Returns a layer's attention scoring if `TrainingForward` gives its numbers, else None.

    It compares them on random numbers, in fp32: a layer may ignore positions or scale what it adds,
    which only its code shows.
    """
    module = convert_to_fp32(module)
    generator = torch.Generator().manual_seed(0)
    attention = module.self_attn
    x = torch.randn(1, 4, attention.q_proj.in_features, generator=generator)
    angles = torch.rand(1, 4, attention.head_dim // 2, generator=generator).repeat(1, 1, 2)
    positions = (angles.cos(), angles.sin())
    plan = RecordingPlan(Tree((4,), ()))
    in_fp32 = torch.autocast("cpu", enabled=False)
    try:
        with attention_as(attention.config, ATTENTION_NAME), in_fp32:
            expected = type(module).forward(module, x, position_embeddings=positions, plan=plan)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None  # it needs other arguments than such layers do
    forward = TrainingForward(DecoderLayer(module, plan.scoring), RotationCache())
    with in_fp32:
        computed = forward(x, plan=plan, position_embeddings=positions)
    same = isinstance(expected, Tensor) and torch.allclose(expected, computed, rtol=1e-4, atol=1e-4)
    return plan.scoring if same else None


def fast_forward_pass(model: nn.Module) -> AbstractContextManager[None]:
    """Within it, supported modules use fast products and keep less for the backward pass."""
    if is_sharded(model):  # its weights are other tensors while they are computed with
        return nullcontext()
    rotations = RotationCache()
    layer_forwards = {
        x.module: dispatch_on_plan(x.module, TrainingForward(x, rotations))
        for x in find_supported_layers(model)
    }
    return computed_as(
        {
            **make_linear_forwards(model),
            **make_norm_forwards(model),
            **make_mlp_forwards(model),
            **make_embedding_forwards(model),
            **layer_forwards,
        }
    )


def fast_decoding(model: nn.Module, rows: int) -> AbstractContextManager[None]:
    """Within it, forward passes over few tokens are fast, and have no gradient.

    The model's weights must not change within it, because it uses copies of them.

    Args:
        rows: the usual number of tokens, for which the weights are packed.
    """
    layers, rotations = find_supported_layers(model), RotationCache()
    inside = {part for layer in layers for part in layer.module.modules()}
    others = [part for part in find_linear_layers(model) if part not in inside]
    layer_forwards = {
        x.module: dispatch_on_plan(x.module, DecodeForward(x, rotations, rows)) for x in layers
    }
    return computed_as(
        {**make_packed_forwards(rows, others), **make_norm_forwards(model), **layer_forwards}
    )
