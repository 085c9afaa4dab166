"""Decoder layers of Llama's kind written out: few operations, and little kept for the backward.

Such a layer is x + attention(norm(x)), and then that + gated(norm(that)), with rotary positions:
2302.13971; Qwen2, Mistral and SmolLM2 are of this kind. In fp32 on a CPU alone, and only where it
gives the numbers of transformers' own layer, which is tried once for each layer.

Shape letters as in `attention.py`; F is the width of the gated block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo.models.cpu import compiled
from grpo.models.cpu.linear import (
    LaidOut,
    by_onednn,
    plus,
    to_weight,
)
from grpo.models.cpu.modules import (
    epsilon_of,
    gated_backward,
    norm_backward,
    normed,
    normed_by,
    rms_factor,
)
from grpo.models.plan import Plan, Scoring

Positions = tuple[Tensor, Tensor]  # cosines and sines [1, T, d], as transformers gives its layers


@dataclass(frozen=True)
class Rotation:
    """Rotary positions (2104.09864) of T tokens; a head's halves turn against each other."""

    cos_T1d: Tensor
    sin_T1d: Tensor  # negative in the first half

    @classmethod
    def of(cls, position_embeddings: Positions) -> Rotation:
        cos_Td, sin_Td = (x[0] for x in position_embeddings)
        half = sin_Td.shape[-1] // 2
        sin_Td = torch.cat([-sin_Td[:, :half], sin_Td[:, half:]], dim=-1)
        return cls(cos_Td[:, None], sin_Td[:, None])

    def turn_(self, x_THd: Tensor) -> Tensor:
        """In place."""
        other = x_THd.roll(x_THd.shape[-1] // 2, -1).mul_(self.sin_T1d)
        return x_THd.mul_(self.cos_T1d).add_(other)

    def turn_back(self, x_THd: Tensor) -> Tensor:
        """What `turn_` does, transposed: its gradient."""
        other = (x_THd * self.sin_T1d).roll(x_THd.shape[-1] // 2, -1)
        return other.addcmul_(x_THd, self.cos_T1d)


class Rotations:
    """The rotation of the forward pass that is under way: made once for all of its layers."""

    def __init__(self) -> None:
        self.made_of: Positions | None = None

    def of(self, position_embeddings: Positions) -> Rotation:
        if self.made_of is not position_embeddings:
            self.made_of, self.rotation = position_embeddings, Rotation.of(position_embeddings)
        return self.rotation


class Asked(torch.autograd.Function):
    """Queries, keys and values of a layer's input; keeps the input and a factor a token."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, norm: Tensor, epsilon: float, width: int, rotation: Rotation,
        *parameters: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """parameters: weight, and bias or None, of queries, keys and values."""
        weights, biases = parameters[::2], parameters[1::2]
        factor_T1 = rms_factor(x_TD, epsilon)
        y_TD = normed(x_TD, factor_T1, norm)
        asked = [
            by_onednn(y_TD, weight, bias).unflatten(-1, (-1, width))
            for weight, bias in zip(weights, biases, strict=True)
        ]
        ctx.save_for_backward(x_TD, norm, factor_T1, *weights)
        ctx.rotation = rotation
        return rotation.turn_(asked[0]), rotation.turn_(asked[1]), asked[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, norm, factor_T1, *weights = ctx.saved_tensors
        y_TD = normed(x_TD, factor_T1, norm)
        turn = ctx.rotation.turn_back
        to_asked = [x.flatten(1) for x in (turn(grads[0]), turn(grads[1]), grads[2])]
        to_y_TD = torch.zeros_like(y_TD)
        to_weights: list[Tensor | None] = []
        needed = ctx.needs_input_grad[5:]
        for n, (grad, weight) in enumerate(zip(to_asked, weights, strict=True)):
            to_y_TD = plus(to_y_TD, grad, weight.t())
            to_weights.append(to_weight(weight, grad, y_TD) if needed[2 * n] else None)
            to_weights.append(grad.sum(dim=0) if needed[2 * n + 1] else None)
        to_x_TD, to_norm = norm_backward(to_y_TD, x_TD, norm, factor_T1)
        return to_x_TD, to_norm, None, None, None, *to_weights


class Finished(torch.autograd.Function):
    """A layer's output from its input and what its attention took; keeps what lies between."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, taken_TX: Tensor, norm: Tensor, epsilon: float,
        out: Tensor, gate: Tensor, up: Tensor, down: Tensor,
    ) -> Tensor:  # fmt: skip
        middle_TD = plus(x_TD, taken_TX, out)
        factor_T1 = rms_factor(middle_TD, epsilon)
        y_TD = normed(middle_TD, factor_T1, norm)
        gate_TF, up_TF = by_onednn(y_TD, gate), by_onednn(y_TD, up)
        ctx.save_for_backward(
            taken_TX, middle_TD, factor_T1, gate_TF, up_TF, norm, out, gate, up, down
        )
        return plus(middle_TD, F.silu(gate_TF).mul_(up_TF), down)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        taken_TX, middle_TD, factor_T1, gate_TF, up_TF, norm, out, gate, up, down = (
            ctx.saved_tensors
        )
        needed = ctx.needs_input_grad
        to_gate_TF, to_up_TF, to_down = gated_backward(grad_TD, gate_TF, up_TF, down, needed[7])
        y_TD = normed(middle_TD, factor_T1, norm)
        to_gate = to_weight(gate, to_gate_TF, y_TD) if needed[5] else None
        to_up = to_weight(up, to_up_TF, y_TD) if needed[6] else None
        to_y_TD = plus(by_onednn(to_gate_TF, gate.t()), to_up_TF, up.t())
        to_middle_TD, to_norm = norm_backward(to_y_TD, middle_TD, norm, factor_T1)
        to_middle_TD.add_(grad_TD)
        to_out = to_weight(out, to_middle_TD, taken_TX) if needed[4] else None
        to_taken_TX = by_onednn(to_middle_TD, out.t())
        return to_middle_TD, to_taken_TX, to_norm, None, to_out, to_gate, to_up, to_down


@dataclass(frozen=True)
class Layer:
    """A layer of this kind, and how it scores a key."""

    module: Any
    how: Scoring

    @property
    def asking(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """What makes queries, keys and values."""
        attention = self.module.self_attn
        return attention.q_proj, attention.k_proj, attention.v_proj

    @property
    def norms(self) -> tuple[tuple[Tensor, float], tuple[Tensor, float]]:
        """Weight and epsilon before the attention, and before the block."""
        one, two = self.module.input_layernorm, self.module.post_attention_layernorm
        return (one.weight, epsilon_of(one)), (two.weight, epsilon_of(two))

    def attend(self, plan: Plan, *asked_THd: Tensor) -> Tensor:
        """[T, H·d]"""
        queries_HTd, keys_KTd, values_KTd = (x.transpose(0, 1) for x in asked_THd)
        number = self.module.self_attn.layer_idx
        return plan.attend(number, queries_HTd, keys_KTd, values_KTd, self.how).flatten(1)


class WithGradient:
    """A layer's forward."""

    def __init__(self, layer: Layer, rotations: Rotations) -> None:
        self.layer, self.rotations = layer, rotations

    def __call__(self, hidden: Tensor, *, plan: Plan, position_embeddings: Positions) -> Tensor:
        """[1, T, D]"""
        layer, x_TD = self.layer, hidden[0]
        (norm, epsilon), (next_norm, next_epsilon) = layer.norms
        attention, block = layer.module.self_attn, layer.module.mlp
        weights = [w for linear in layer.asking for w in (linear.weight, linear.bias)]
        rotation = self.rotations.of(position_embeddings)
        asked = Asked.apply(x_TD, norm, epsilon, attention.head_dim, rotation, *weights)  # type: ignore[no-untyped-call]
        taken_TX = layer.attend(plan, *asked)
        done_TD: Tensor = Finished.apply(  # type: ignore[no-untyped-call]
            x_TD, taken_TX, next_norm, next_epsilon, attention.o_proj.weight,
            block.gate_proj.weight, block.up_proj.weight, block.down_proj.weight,
        )  # fmt: skip
        return done_TD[None]


def gated_by(gate_up: Tensor) -> Tensor:
    """As `compiled.gated`."""
    gate_TF, up_TF = gate_up.chunk(2, dim=-1)
    return F.silu(gate_TF).mul_(up_TF)


class ForFewRows:
    """A layer's forward without gradient, from copies of its weights that are laid out together."""

    def __init__(self, layer: Layer, rotations: Rotations, rows: int) -> None:
        """rows: how many tokens there will mostly be. The weights must not change meanwhile."""
        attention, block = layer.module.self_attn, layer.module.mlp
        self.layer, self.rotations, self.width = layer, rotations, attention.head_dim
        self.turned = (attention.q_proj.out_features + attention.k_proj.out_features) // self.width
        self.queries = attention.q_proj.out_features // self.width
        self.ask = LaidOut(rows, *layer.asking)
        self.out = LaidOut(rows, attention.o_proj)
        self.gate_up = LaidOut(rows, block.gate_proj, block.up_proj)
        self.down = LaidOut(rows, block.down_proj)
        compiles = compiled.kernel() is not None
        self.norm = compiled.normed if compiles else normed_by
        self.gated = compiled.gated if compiles else gated_by

    def __call__(self, hidden: Tensor, *, plan: Plan, position_embeddings: Positions) -> Tensor:
        """[1, T, D]"""
        x_TD = hidden[0]
        first, second = self.layer.norms
        asked_TXd = self.ask(self.norm(x_TD, *first)).unflatten(-1, (-1, self.width))
        self.rotations.of(position_embeddings).turn_(asked_TXd[:, : self.turned])
        taken_TX = self.layer.attend(
            plan,
            asked_TXd[:, : self.queries],
            asked_TXd[:, self.queries : self.turned],
            asked_TXd[:, self.turned :],
        )
        x_TD = self.out.plus(x_TD, taken_TX)
        return self.down.plus(x_TD, self.gated(self.gate_up(self.norm(x_TD, *second))))[None]
