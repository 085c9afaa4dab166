"""Parts of decoder layers that keep less for the backward pass, and go over it less often.

They compute what transformers' own modules do; each class is tried against it, once, before it is
taken to be one of these. In fp32 on a CPU alone.
"""

from __future__ import annotations

import copy
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

_matches: dict[tuple[type, type], bool] = {}  # by class, and its activation's


def rms_factor(x: Tensor, epsilon: float) -> Tensor:
    """[..., 1] what brings each token to a root mean square of 1."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.rsqrt_(length.square_().div_(x.shape[-1]).add_(epsilon))


def scale_by_rms(x: Tensor, factor: Tensor, weight: Tensor) -> Tensor:
    return (x * factor).mul_(weight)


def rms_norm_no_grad(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) · weight (1910.07467), without gradient."""
    return scale_by_rms(x, rms_factor(x, epsilon), weight)


def norm_backward(grad: Tensor, x: Tensor, weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient by x and by the weight."""
    normal = x * factor
    both = grad * normal
    along = (both @ weight).div_(x.shape[-1])[..., None]
    to_x = (grad * weight).sub_(normal.mul_(along)).mul_(factor)
    return to_x, both.flatten(0, -2).sum(dim=0)


class RMSNorm(torch.autograd.Function):
    """As `rms_norm_no_grad`; keeps x, the weight and a factor a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        factor = rms_factor(x, epsilon)
        ctx.save_for_backward(x, weight, factor)
        return scale_by_rms(x, factor, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *norm_backward(grad, *ctx.saved_tensors), None


def gated_backward(
    grad_TD: Tensor, gate_TF: Tensor, up_TF: Tensor, weight: Tensor, weight_needs: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradient of (silu(gate) · up) · weightᵀ by gate, up and the weight."""
    opened = F.silu(gate_TF)
    of_weight = (
        accumulate_weight_gradient(weight, grad_TD, opened * up_TF) if weight_needs else None
    )
    back = linear_onednn(grad_TD, weight.t())
    to_up = opened.mul_(back)
    return torch.ops.aten.silu_backward(back.mul_(up_TF), gate_TF), to_up, of_weight


class GatedProduct(torch.autograd.Function):
    """silu(gate) · up, times a weight (2002.05202); keeps gate, up and the weight."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return linear_onednn(F.silu(gate).mul_(up), weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        grad_TD, gate_TF, up_TF = (x.reshape(-1, x.shape[-1]) for x in (grad, gate, up))
        needed = ctx.needs_input_grad[2]
        to_gate, to_up, of_weight = gated_backward(grad_TD, gate_TF, up_TF, weight, needed)
        return to_gate.view(gate.shape), to_up.view(up.shape), of_weight


class EmbeddingLookup(torch.autograd.Function):
    """An embedding's rows.

    Their gradient is added up in what the weight has of it already; torch makes one of the
    weight's size first, of zeros for all tokens that did not occur.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight_VD: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(tokens, weight_VD)
        ctx.padding = padding
        return F.embedding(tokens, weight_VD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight_VD = ctx.saved_tensors
        there_VD = weight_VD.grad if weight_VD.is_leaf else None
        if there_VD is None:
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
        there_VD.index_add_(0, used_U, sums_UD)  # each row once, so in no order
        return None, None, None


def look_up_embedding(tokens: Tensor, embedding: nn.Embedding) -> Tensor:
    padding = -1 if embedding.padding_idx is None else embedding.padding_idx
    y: Tensor = EmbeddingLookup.apply(tokens, embedding.weight, padding)  # type: ignore[no-untyped-call]
    return y


def rms_norm(x: Tensor, norm: Any) -> Tensor:
    y: Tensor = RMSNorm.apply(x, norm.weight, get_epsilon(norm))  # type: ignore[no-untyped-call]
    return y


def get_epsilon(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def gated_mlp(x: Tensor, block: Any) -> Tensor:
    """A gated feed-forward block; its parts may be wrapped, by an adapter say."""
    y: Tensor = GatedProduct.apply(  # type: ignore[no-untyped-call]
        block.gate_proj(x), block.up_proj(x), block.down_proj.weight
    )
    return y


def looks_like_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(weight, Tensor)
        and weight.dim() == 1
        and isinstance(get_epsilon(module), float)
        and suits_onednn(weight)
    )


def looks_gated(module: Any) -> bool:
    down = getattr(module, "down_proj", None)
    return (
        hasattr(module, "gate_proj")
        and hasattr(module, "up_proj")
        and type(down) is nn.Linear
        and down.bias is None
        and suits_onednn(down.weight)
    )


def make_norm_forwards(model: nn.Module) -> dict[nn.Module, ModuleForward]:
    """Its root-mean-square norms, and what computes them."""
    return {
        module: partial(rms_norm, norm=module)
        for module in filter(looks_like_norm, model.modules())
        if is_standard_rms_norm(module)
    }


@torch.no_grad()
def is_standard_rms_norm(module: Any) -> bool:
    """Whether `rms_norm` does what norms of this class do, tried with a weight that is not ones.

    FalconMamba's have a weight and don't use it.
    """
    kind = (type(module), type(None))
    if kind not in _matches:
        tried = copy.deepcopy(module)
        tried.weight.copy_(torch.linspace(0.5, 2.0, len(tried.weight)))
        matches_module(tried, partial(rms_norm, norm=tried), len(tried.weight))
    return _matches[kind]


def make_mlp_forwards(model: nn.Module) -> dict[nn.Module, ModuleForward]:
    """Its gated feed-forward blocks, and what computes them."""
    found: dict[nn.Module, ModuleForward] = {}
    for module in filter(looks_gated, model.modules()):
        forward = partial(gated_mlp, block=module)
        if matches_module(module, forward, module.down_proj.out_features):  # type: ignore[union-attr,arg-type]
            found[module] = forward
    return found


def make_embedding_forwards(model: nn.Module) -> dict[nn.Module, ModuleForward]:
    """Its embeddings; a class of its own may scale them, and is left alone."""
    return {
        module: partial(look_up_embedding, embedding=module)
        for module in model.modules()
        if type(module) is nn.Embedding
        and module.max_norm is None
        and not (module.scale_grad_by_freq or module.sparse)
        and suits_onednn(module.weight)
    }


@torch.no_grad()
def matches_module(module: Any, forward: ModuleForward, width: int) -> bool:
    """Whether a function does what modules of this class do, tried on random numbers."""
    kind = (type(module), type(getattr(module, "act_fn", None)))
    if kind not in _matches:
        x = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0))
        own = type(module).forward(module, x)
        _matches[kind] = bool((own - forward(x)).abs().max() <= 1e-4 * own.abs().max())
    return _matches[kind]
