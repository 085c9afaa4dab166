"""Modules of decoder layers that keep and read less memory for the backward pass.

They compute the same as transformers' own modules; each class of these is compared with them once
before they replace it. Only on a CPU, in fp32 and in bf16 where `linear.suits_onednn` says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo.models.cpu.linear import (
    ModuleForward,
    accumulate_weight_gradient,
    linear_onednn,
    suits_onednn,
)

_matches: dict[tuple[type, type], bool] = {}  # by the class of a module and of its activation


def rms_factor(x: Tensor, epsilon: float) -> Tensor:
    """Returns the factor [..., 1] that scales each token to a root mean square of 1."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.rsqrt_(length.square_().div_(x.shape[-1]).add_(epsilon))


def scale_by_rms(x: Tensor, factor: Tensor, weight: Tensor) -> Tensor:
    """Returns x · factor · weight."""
    return (x * factor).mul_(weight)


def rms_norm_no_grad(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Computes x / rms(x) · weight (1910.07467), without gradient."""
    return scale_by_rms(x, rms_factor(x, epsilon), weight)


def norm_backward(grad: Tensor, x: Tensor, weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of a norm's input x and of its weight."""
    normalized = x * factor
    product = grad * normalized
    along = (product @ weight).div_(x.shape[-1])[..., None]  # the gradient's part along x
    to_x = (grad * weight).sub_(normalized.mul_(along)).mul_(factor)
    return to_x, product.flatten(0, -2).sum(dim=0)


class RMSNorm(torch.autograd.Function):
    """Computes `rms_norm_no_grad` with gradient; keeps x, the weight and one number a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        factor = rms_factor(x, epsilon)
        ctx.save_for_backward(x, weight, factor)
        return scale_by_rms(x, factor, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *norm_backward(grad, *ctx.saved_tensors), None


def gated_backward(
    grad_TD: Tensor, gate_TF: Tensor, up_TF: Tensor, weight: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the gradients of gate, up and weight in (silu(gate) · up) · weightᵀ.

    grad, gate and up have the same precision.

    The weight's is None if it isn't needed, or was added in place to an existing one.
    """
    activated = F.silu(gate_TF)
    to_weight = (
        accumulate_weight_gradient(weight, grad_TD, activated * up_TF) if needs_weight else None
    )
    to_product = linear_onednn(grad_TD, weight.t())
    to_up = activated.mul_(to_product)
    return torch.ops.aten.silu_backward(to_product.mul_(up_TF), gate_TF), to_up, to_weight


class GatedProduct(torch.autograd.Function):
    """Computes (silu(gate) · up) · weightᵀ (2002.05202); keeps gate, up and the weight."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return linear_onednn(F.silu(gate).mul_(up), weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        grad = grad.to(gate.dtype)
        grad_TD, gate_TF, up_TF = (x.reshape(-1, x.shape[-1]) for x in (grad, gate, up))
        needed = ctx.needs_input_grad[2]
        to_gate, to_up, to_weight = gated_backward(grad_TD, gate_TF, up_TF, weight, needed)
        return to_gate.view(gate.shape), to_up.view(up.shape), to_weight


class EmbeddingLookup(torch.autograd.Function):
    """Looks up an embedding's rows.

    It adds their gradient in place to the weight's existing one; torch would first make a gradient
    of the weight's size, with zeros for all tokens that did not occur.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight_VD: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(tokens, weight_VD)
        ctx.padding = padding
        return F.embedding(tokens, weight_VD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight_VD = ctx.saved_tensors
        existing_VD = weight_VD.grad if weight_VD.is_leaf else None
        if existing_VD is None:
            size = len(weight_VD)
            return (
                None,
                torch.ops.aten.embedding_dense_backward(grad, tokens, size, ctx.padding, False),
                None,
            )
        if ctx.padding >= 0:
            grad = grad.masked_fill((tokens == ctx.padding)[..., None], 0)
        used_U, place = tokens.unique(return_inverse=True)
        sums_UD = torch.ops.aten.embedding_dense_backward(grad, place, len(used_U), -1, False)
        existing_VD.index_add_(0, used_U, sums_UD)  # adds to each row once, so order doesn't matter
        return None, None, None


def look_up_embedding(tokens: Tensor, embedding: nn.Embedding) -> Tensor:
    """Computes an embedding's forward with `EmbeddingLookup`."""
    padding = -1 if embedding.padding_idx is None else embedding.padding_idx
    y: Tensor = EmbeddingLookup.apply(tokens, embedding.weight, padding)  # type: ignore[no-untyped-call]
    return y


def rms_norm(x: Tensor, norm: Any) -> Tensor:
    """Computes a norm's forward with `RMSNorm`."""
    y: Tensor = RMSNorm.apply(x, norm.weight, get_epsilon(norm))  # type: ignore[no-untyped-call]
    return y


def get_epsilon(norm: Any) -> Any:
    """Returns a norm's epsilon, for which models use two names; None if it has neither."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def gated_mlp(x: Tensor, block: Any) -> Tensor:
    """Computes a gated MLP's forward; gate_proj and up_proj may be wrapped, by an adapter say."""
    y: Tensor = GatedProduct.apply(  # type: ignore[no-untyped-call]
        block.gate_proj(x), block.up_proj(x), block.down_proj.weight
    )
    return y


def looks_like_norm(module: Any) -> bool:
    """Returns whether a module has an RMS norm's name, weight and epsilon, in fp32 on a CPU."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(weight, Tensor)
        and weight.dim() == 1
        and isinstance(get_epsilon(module), float)
        and suits_onednn(weight)
    )


def looks_gated(module: Any) -> bool:
    """Returns whether a module has the parts of a gated MLP, in fp32 on a CPU."""
    down = getattr(module, "down_proj", None)
    return (
        hasattr(module, "gate_proj")
        and hasattr(module, "up_proj")
        and type(down) is nn.Linear
        and down.bias is None
        and suits_onednn(down.weight)
    )


def make_norm_forwards(model: nn.Module) -> dict[nn.Module, ModuleForward]:
    """Returns a forward for each root-mean-square norm of the model."""
    return {
        module: partial(rms_norm, norm=module)
        for module in filter(looks_like_norm, model.modules())
        if is_standard_rms_norm(module)
    }


@torch.no_grad()
def is_standard_rms_norm(module: Any) -> bool:
    """Returns whether `rms_norm` computes the same as this class, tried with distinct weights.

    The norms of FalconMamba have a weight but don't use it.
    """
    kind = (type(module), type(None))
    if kind not in _matches:
        norm = copy.deepcopy(module)
        norm.weight.copy_(torch.linspace(0.5, 2.0, len(norm.weight)))
        matches_module(norm, lambda x: partial(rms_norm, norm=x), len(norm.weight))
    return _matches[kind]


def make_mlp_forwards(model: nn.Module) -> dict[nn.Module, ModuleForward]:
    """Returns a forward for each gated MLP of the model."""
    forwards: dict[nn.Module, ModuleForward] = {}
    for module in filter(looks_gated, model.modules()):
        width: int = module.down_proj.out_features  # type: ignore[union-attr,assignment]
        if matches_module(module, lambda x: partial(gated_mlp, block=x), width):
            forwards[module] = partial(gated_mlp, block=module)
    return forwards


def make_embedding_forwards(model: nn.Module) -> dict[nn.Module, ModuleForward]:
    """Returns a forward for each embedding of the model.

    Subclasses of nn.Embedding are left out, because they may scale the rows.
    """
    return {
        module: partial(look_up_embedding, embedding=module)
        for module in model.modules()
        if type(module) is nn.Embedding
        and module.max_norm is None
        and not (module.scale_grad_by_freq or module.sparse)
        and suits_onednn(module.weight)
    }


def convert_to_fp32(module: Any) -> Any:
    """Returns the module if its weights are in fp32, else a copy in fp32."""
    if all(x.dtype == torch.float32 for x in module.parameters()):
        return module
    return copy.deepcopy(module).float()


@torch.no_grad()
def matches_module(module: Any, forward: Callable[..., ModuleForward], width: int) -> bool:
    """Returns whether a function computes the same as the module's class, on random numbers.

    Args:
        forward: makes the function of a module.
    """
    kind = (type(module), type(getattr(module, "act_fn", None)))
    if kind not in _matches:
        module = convert_to_fp32(module)
        x = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", enabled=False):
            expected, ours = type(module).forward(module, x), forward(module)(x)
        _matches[kind] = bool((expected - ours).abs().max() <= 1e-4 * expected.abs().max())
    return _matches[kind]
