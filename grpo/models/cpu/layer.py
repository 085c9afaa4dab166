"""Llama's decoder layer with few operations, and with little memory kept for the backward pass.

Such a layer computes y = x + attention(norm(x)) and then y + mlp(norm(y)), with rotary positions
(2302.13971); Qwen2, Mistral and SmolLM2 have it too. It is used only on a CPU, in fp32 or in bf16
(see `linear.suits_onednn`), and only if it gives the numbers of transformers' own layer, which is
checked once for each layer in fp32.

Shape letters as in `attention.py`; F is the width of the gated MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo.models.attention_plan import AttentionPlan, AttentionScoring
from grpo.models.cpu import kernel
from grpo.models.cpu.linear import (
    PackedLinear,
    accumulate_weight_gradient,
    compute_dtype,
    linear_add_onednn,
    linear_onednn,
)
from grpo.models.cpu.modules import (
    gated_backward,
    get_epsilon,
    norm_backward,
    rms_factor,
    rms_norm_no_grad,
    scale_by_rms,
)

Positions = tuple[Tensor, Tensor]  # cosines and sines [1, T, d], as transformers gives its layers


@dataclass(frozen=True)
class Rotation:
    """Rotary positions (2104.09864) of T tokens, which rotate pairs from the halves of a head."""

    cos_T1d: Tensor
    sin_T1d: Tensor  # negative in the first half

    @classmethod
    def from_embeddings(cls, position_embeddings: Positions) -> Rotation:
        """Makes a rotation from the cosines and sines that transformers computes."""
        cos_Td, sin_Td = (x[0] for x in position_embeddings)
        half = sin_Td.shape[-1] // 2
        sin_Td = torch.cat([-sin_Td[:, :half], sin_Td[:, half:]], dim=-1)
        return cls(cos_Td[:, None], sin_Td[:, None])

    def rotate_(self, x_THd: Tensor) -> Tensor:
        """Rotates queries or keys [T, H, d] in place."""
        other = x_THd.roll(x_THd.shape[-1] // 2, -1).mul_(self.sin_T1d)
        return x_THd.mul_(self.cos_T1d).add_(other)

    def rotate_back(self, x_THd: Tensor) -> Tensor:
        """Applies the transpose of `rotate_`, which is its gradient."""
        other = (x_THd * self.sin_T1d).roll(x_THd.shape[-1] // 2, -1)
        return other.addcmul_(x_THd, self.cos_T1d)


class RotationCache:
    """The rotation of the current forward pass, made once for all its layers."""

    def __init__(self) -> None:
        self.position_embeddings: Positions | None = None

    def get_rotation(self, position_embeddings: Positions) -> Rotation:
        """Returns the rotation of these embeddings; makes it if they are new."""
        if self.position_embeddings is not position_embeddings:
            self.position_embeddings, self.rotation = (
                position_embeddings,
                Rotation.from_embeddings(position_embeddings),
            )
        return self.rotation


class NormQKV(torch.autograd.Function):
    """Computes a layer's queries, keys and values; keeps its input and one number a token."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, norm: Tensor, epsilon: float, width: int, rotation: Rotation,
        *parameters: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """
        Args:
            width: of a head.
            parameters: weight and bias (or None) of queries, keys and values in turn.
        """
        weights, biases = parameters[::2], parameters[1::2]
        factor_T1 = rms_factor(x_TD, epsilon)
        y_TD = scale_by_rms(x_TD, factor_T1, norm).to(compute_dtype(x_TD))
        queries, keys, values = [
            linear_onednn(y_TD, weight, bias).float().unflatten(-1, (-1, width))
            for weight, bias in zip(weights, biases, strict=True)
        ]
        ctx.save_for_backward(x_TD, norm, factor_T1, *weights)
        ctx.rotation, ctx.dtype = rotation, y_TD.dtype
        return rotation.rotate_(queries), rotation.rotate_(keys), values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, norm, factor_T1, *weights = ctx.saved_tensors
        y_TD = scale_by_rms(x_TD, factor_T1, norm).to(ctx.dtype)
        rotated = (ctx.rotation.rotate_back(grads[0]), ctx.rotation.rotate_back(grads[1]), grads[2])
        to_qkv = [x.flatten(1).to(ctx.dtype) for x in rotated]
        to_y_TD = torch.zeros_like(y_TD)
        to_weights: list[Tensor | None] = []
        needed = ctx.needs_input_grad[5:]
        for n, (grad, weight) in enumerate(zip(to_qkv, weights, strict=True)):
            to_y_TD = linear_add_onednn(to_y_TD, grad, weight.t())
            to_weights.append(
                accumulate_weight_gradient(weight, grad, y_TD) if needed[2 * n] else None
            )
            to_weights.append(grad.sum(dim=0, dtype=torch.float32) if needed[2 * n + 1] else None)
        to_x_TD, to_norm = norm_backward(to_y_TD, x_TD, norm, factor_T1)
        return to_x_TD, to_norm, None, None, None, *to_weights


class OutputAndMLP(torch.autograd.Function):
    """Computes a layer's output from its input and its attention; keeps intermediate results."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, attention_TX: Tensor, norm: Tensor, epsilon: float,
        out: Tensor, gate: Tensor, up: Tensor, down: Tensor,
    ) -> Tensor:  # fmt: skip
        middle_TD = linear_add_onednn(x_TD, attention_TX, out)
        factor_T1 = rms_factor(middle_TD, epsilon)
        y_TD = scale_by_rms(middle_TD, factor_T1, norm).to(compute_dtype(x_TD))
        gate_TF, up_TF = linear_onednn(y_TD, gate), linear_onednn(y_TD, up)
        ctx.save_for_backward(
            attention_TX, middle_TD, factor_T1, gate_TF, up_TF, norm, out, gate, up, down
        )
        return linear_add_onednn(middle_TD, F.silu(gate_TF).mul_(up_TF), down)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        attention_TX, middle_TD, factor_T1, gate_TF, up_TF, norm, out, gate, up, down = (
            ctx.saved_tensors
        )
        needed = ctx.needs_input_grad
        dtype = gate_TF.dtype
        to_gate_TF, to_up_TF, to_down = gated_backward(
            grad_TD.to(dtype), gate_TF, up_TF, down, needed[7]
        )
        y_TD = scale_by_rms(middle_TD, factor_T1, norm).to(dtype)
        to_gate = accumulate_weight_gradient(gate, to_gate_TF, y_TD) if needed[5] else None
        to_up = accumulate_weight_gradient(up, to_up_TF, y_TD) if needed[6] else None
        to_y_TD = linear_add_onednn(linear_onednn(to_gate_TF, gate.t()), to_up_TF, up.t())
        to_middle_TD, to_norm = norm_backward(to_y_TD, middle_TD, norm, factor_T1)
        to_middle_TD.add_(grad_TD)
        factor_TD = to_middle_TD.to(dtype)
        factor_TX = attention_TX.to(dtype)
        to_out = accumulate_weight_gradient(out, factor_TD, factor_TX) if needed[4] else None
        to_attention_TX = linear_onednn(factor_TD, out.t()).float()
        return to_middle_TD, to_attention_TX, to_norm, None, to_out, to_gate, to_up, to_down


@dataclass(frozen=True)
class DecoderLayer:
    """A supported layer of the model, with its attention's scoring."""

    module: Any
    scoring: AttentionScoring

    @property
    def qkv_projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """The layers that compute queries, keys and values."""
        attention = self.module.self_attn
        return attention.q_proj, attention.k_proj, attention.v_proj

    @property
    def norms(self) -> tuple[tuple[Tensor, float], tuple[Tensor, float]]:
        """Weight and epsilon of the norm before the attention, and of that before the MLP."""
        first, second = self.module.input_layernorm, self.module.post_attention_layernorm
        return (first.weight, get_epsilon(first)), (second.weight, get_epsilon(second))

    def attend(self, plan: AttentionPlan, *qkv_THd: Tensor) -> Tensor:
        """Returns the attention [T, H·d] of queries [T, H, d], keys and values [T, K, d]."""
        queries_HTd, keys_KTd, values_KTd = (x.transpose(0, 1) for x in qkv_THd)
        number = self.module.self_attn.layer_idx
        return plan.attend(number, queries_HTd, keys_KTd, values_KTd, self.scoring).flatten(1)


class TrainingForward:
    """A layer's forward with gradient."""

    def __init__(self, layer: DecoderLayer, rotations: RotationCache) -> None:
        self.layer, self.rotations = layer, rotations

    def __call__(
        self, hidden: Tensor, *, plan: AttentionPlan, position_embeddings: Positions
    ) -> Tensor:
        """Returns the layer's output [1, T, D] for its input [1, T, D]."""
        layer, x_TD = self.layer, hidden[0]
        (norm, epsilon), (next_norm, next_epsilon) = layer.norms
        attention, mlp = layer.module.self_attn, layer.module.mlp
        weights = [w for linear in layer.qkv_projections for w in (linear.weight, linear.bias)]
        rotation = self.rotations.get_rotation(position_embeddings)
        qkv = NormQKV.apply(x_TD, norm, epsilon, attention.head_dim, rotation, *weights)  # type: ignore[no-untyped-call]
        attention_TX = layer.attend(plan, *qkv)
        output_TD: Tensor = OutputAndMLP.apply(  # type: ignore[no-untyped-call]
            x_TD, attention_TX, next_norm, next_epsilon, attention.o_proj.weight,
            mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight,
        )  # fmt: skip
        return output_TD[None]


def swiglu_torch(gate_up: Tensor) -> Tensor:
    """Computes the same as `kernel.swiglu_compiled`, with torch."""
    gate_TF, up_TF = gate_up.chunk(2, dim=-1)
    return F.silu(gate_TF).mul_(up_TF)


class DecodeForward:
    """A layer's forward without gradient, with packed copies of its weights.

    The layer's weights must not change while it is used.
    """

    def __init__(self, layer: DecoderLayer, rotations: RotationCache, rows: int) -> None:
        """rows: the usual number of tokens, for which the weights are packed."""
        attention, mlp = layer.module.self_attn, layer.module.mlp
        self.layer, self.rotations, self.width = layer, rotations, attention.head_dim
        self.rotated_heads = (
            attention.q_proj.out_features + attention.k_proj.out_features
        ) // self.width
        self.query_heads = attention.q_proj.out_features // self.width
        self.project_qkv = PackedLinear(rows, *layer.qkv_projections)
        self.out = PackedLinear(rows, attention.o_proj)
        self.gate_up = PackedLinear(rows, mlp.gate_proj, mlp.up_proj)
        self.down = PackedLinear(rows, mlp.down_proj)
        has_kernel = kernel.load_kernel() is not None
        self.norm = kernel.rms_norm_compiled if has_kernel else rms_norm_no_grad
        self.swiglu = kernel.swiglu_compiled if has_kernel else swiglu_torch

    def __call__(
        self, hidden: Tensor, *, plan: AttentionPlan, position_embeddings: Positions
    ) -> Tensor:
        """Returns the layer's output [1, T, D] for its input [1, T, D]."""
        x_TD = hidden[0]
        first, second = self.layer.norms
        qkv_TXd = self.project_qkv(self.norm(x_TD, *first)).unflatten(-1, (-1, self.width))
        self.rotations.get_rotation(position_embeddings).rotate_(qkv_TXd[:, : self.rotated_heads])
        attention_TX = self.layer.attend(
            plan,
            qkv_TXd[:, : self.query_heads],
            qkv_TXd[:, self.query_heads : self.rotated_heads],
            qkv_TXd[:, self.rotated_heads :],
        )
        x_TD = self.out.add_product(x_TD, attention_TX)
        return self.down.add_product(x_TD, self.swiglu(self.gate_up(self.norm(x_TD, *second))))[
            None
        ]
