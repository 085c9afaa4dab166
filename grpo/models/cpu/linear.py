"""Matrix products with a model's weights, the fast way for the device.

On a CPU that is oneDNN's, whatever processor it is; torch itself takes MKL for fp32, which is tuned
for one maker's. docs/performance.md says what it brings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo.models.cpu.kernel import PackedWeight

ModuleForward = Callable[..., Tensor]  # of a module

_mkldnn = torch.ops.mkldnn
HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and hasattr(_mkldnn, "_linear_pointwise")
    and hasattr(_mkldnn, "_reorder_linear_weight")
)


def linear_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, in fp32 on a CPU, without gradient."""
    y: Tensor = _mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def suits_onednn(*tensors: Tensor) -> bool:
    """Whether what is computed with them is in fp32 on a CPU."""
    return (
        HAS_ONEDNN
        and not torch.is_autocast_enabled("cpu")
        and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
    )


def linear_in_fp32(x_TD: Tensor, weight_VD: Tensor) -> Tensor:
    """[T, V] x · weightᵀ summed and given in fp32, from fp32 or from bf16; without gradient."""
    if suits_onednn(x_TD, weight_VD):
        return linear_onednn(x_TD, weight_VD)
    with torch.autocast(x_TD.device.type, enabled=False):
        if x_TD.device.type == "cuda" and x_TD.dtype != torch.float32:
            return torch.mm(x_TD, weight_VD.t(), out_dtype=torch.float32)
        return F.linear(x_TD.float(), weight_VD.float())


def sum_dtype(x: Tensor) -> torch.dtype:
    """What sums of such numbers are kept in: fp32, or fp64 where they are in that."""
    return torch.promote_types(x.dtype, torch.float32)


def matmul_in_fp32(x: Tensor, y: Tensor) -> Tensor:
    """[..., M, N] x [..., M, K] · y [..., K, N], summed and given in fp32 or better."""
    with torch.autocast(x.device.type, enabled=False):
        return x.to(sum_dtype(x)) @ y.to(sum_dtype(y))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision of a product's factors here: autocast's, where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class WideProduct(torch.autograd.Function):
    """x · weightᵀ in fp32 from factors of a lower precision; the weight's gradient is in fp32."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, factor_dtype: torch.dtype) -> Tensor:
        factor_TD, factor_VD = x_TD.to(factor_dtype), weight_VD.to(factor_dtype)
        ctx.save_for_backward(factor_TD, factor_VD)
        ctx.dtypes = x_TD.dtype, weight_VD.dtype
        return linear_in_fp32(factor_TD, factor_VD)

    @staticmethod
    def backward(ctx: Any, grad_TV: Tensor) -> tuple[Tensor | None, ...]:
        factor_TD, factor_VD = ctx.saved_tensors
        grad_TV = grad_TV.to(factor_VD.dtype)
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            to_x = linear_in_fp32(grad_TV, factor_VD.t()).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            to_weight = linear_in_fp32(grad_TV.t(), factor_TD.t()).to(ctx.dtypes[1])
        return to_x, to_weight, None


def wide_product(x: Tensor, weight_VD: Tensor) -> Tensor:
    """[..., V] x · weightᵀ in fp32, whatever precision its factors have here."""
    y_TV: Tensor = WideProduct.apply(  # type: ignore[no-untyped-call]
        x.reshape(-1, x.shape[-1]), weight_VD, compute_dtype(x)
    )
    return y_TV.view(*x.shape[:-1], -1)


def add_to_gradient(grad_VD: Tensor, grad_TV: Tensor, x_TD: Tensor) -> None:
    """Adds gradᵀ · x to an fp32 gradient, summed in fp32 whatever the precision of the two."""
    if grad_TV.dtype == torch.float32:
        grad_VD.addmm_(grad_TV.t(), x_TD)
    else:
        grad_VD.add_(linear_in_fp32(grad_TV.t(), x_TD.t()))


def linear_add_onednn(
    total: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """total + x · weightᵀ + bias, in fp32 on a CPU, without gradient."""
    y: Tensor = _mkldnn._linear_pointwise.binary(x, total, weight, bias, "add")
    return y


def accumulate_weight_gradient(weight: Tensor, grad_TO: Tensor, x_TI: Tensor) -> Tensor | None:
    """The gradient by a weight; None where it has been added to what the weight has already.

    Micro-batches add up their gradients; in place, none is written out first.
    """
    if weight.grad is None:
        return grad_TO.t() @ x_TI
    weight.grad.addmm_(grad_TO.t(), x_TI)
    return None


class LinearFunction(torch.autograd.Function):
    """A linear layer's product by oneDNN, forward and to its input; to its weight by torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, weight_needs, to_bias = ctx.needs_input_grad
        grad_TO = grad.reshape(-1, grad.shape[-1])
        return (
            linear_onednn(grad_TO, weight.t()).view(x.shape) if to_x else None,
            accumulate_weight_gradient(weight, grad_TO, x.reshape(-1, x.shape[-1]))
            if weight_needs
            else None,
            grad_TO.sum(dim=0) if to_bias else None,
        )


def linear_with_gradient(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = LinearFunction.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


def make_linear_forwards(model: nn.Module) -> dict[nn.Module, ModuleForward]:
    """For each fp32 linear layer on a CPU, its forward by oneDNN, with gradient."""
    return {
        layer: partial(linear_with_gradient, weight=layer.weight, bias=layer.bias)
        for layer in find_linear_layers(model)
    }


class PackedLinear:
    """Linear layers' product with the same rows, from one copy of their weights, made here.

    A product of a few rows, as decoding has them, is bound by how the weights are read; they can be
    laid out for that once. Without gradient.
    """

    def __init__(self, rows: int, *layers: nn.Linear) -> None:
        """rows: how many the product will mostly have. The weights must not change meanwhile."""
        whole = torch.cat([layer.weight.detach() for layer in layers])
        bias: Tensor | None = None
        if any(layer.bias is not None for layer in layers):
            none = whole.new_zeros
            biases = [none(x.out_features) if x.bias is None else x.bias.detach() for x in layers]
            bias = torch.cat(biases)
        self.packed = PackedWeight(whole, bias) if PackedWeight.can_pack(whole) else None
        if self.packed is None:
            self.weight, self.bias = _mkldnn._reorder_linear_weight(whole, rows), bias

    def __call__(self, x: Tensor) -> Tensor:
        """What each of the layers would give, end to end."""
        return linear_onednn(x, self.weight, self.bias) if self.packed is None else self.packed(x)

    def add_product(self, total: Tensor, x: Tensor) -> Tensor:
        if self.packed is None:
            return linear_add_onednn(total, x, self.weight, self.bias)
        return self.packed(x, total)


def make_packed_forwards(rows: int, layers: Iterable[nn.Linear]) -> dict[nn.Module, ModuleForward]:
    """For each layer, its forward from a copy of its weights; see `PackedLinear`."""
    return {layer: PackedLinear(rows, layer) for layer in layers}


def find_linear_layers(model: nn.Module) -> list[nn.Linear]:
    """Those whose product can be computed here; a subclass may compute something else."""
    linear = [layer for layer in model.modules() if type(layer) is nn.Linear]
    return [layer for layer in linear if suits_onednn(layer.weight)]


@contextmanager
def computed_as(forwards: Mapping[nn.Module, ModuleForward]) -> Iterator[None]:
    """Within it, these modules compute by these functions."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, own in before.items():
            del module.forward  # the class's own again
            if own is not None:
                module.forward = own
