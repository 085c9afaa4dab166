"""Fast matrix products with a model's weights.

On a CPU they use oneDNN on all processors; torch itself uses MKL for fp32, which is tuned for one
vendor's processors. docs/performance.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo.device import multiplies_bf16
from grpo.models.cpu.kernel import (
    PackedWeight,
    PackedWeightBF16,
    accumulate_product_bf16,
    can_accumulate_bf16,
)

ModuleForward = Callable[..., Tensor]  # replaces the forward of a module

_mkldnn = torch.ops.mkldnn
HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and hasattr(_mkldnn, "_linear_pointwise")
    and hasattr(_mkldnn, "_reorder_linear_weight")
)


def linear_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes x · weightᵀ + bias on a CPU, without gradient.

    Factors and result are in `compute_dtype(x)`; sums are in fp32.
    """
    dtype = compute_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    y: Tensor = _mkldnn._linear_pointwise(x.to(dtype), weight.to(dtype), bias, "none", [], "")
    return y


def suits_onednn(*tensors: Tensor) -> bool:
    """Returns whether products of these tensors on a CPU are fast with oneDNN.

    They are in fp32, and under autocast in bf16 if the processor has instructions for it.
    """
    in_bf16 = torch.is_autocast_enabled("cpu")
    if not HAS_ONEDNN or (in_bf16 and not multiplies_bf16()):
        return False
    dtypes = (torch.float32, torch.bfloat16) if in_bf16 else (torch.float32,)
    return all(x.device.type == "cpu" and x.dtype in dtypes for x in tensors)


def linear_in_fp32(x_TD: Tensor, weight_VD: Tensor) -> Tensor:
    """Returns x · weightᵀ [T, V], summed in fp32, from fp32 or bf16 factors; without gradient."""
    with torch.autocast(x_TD.device.type, enabled=False):
        if suits_onednn(x_TD, weight_VD):
            return linear_onednn(x_TD, weight_VD)
        if x_TD.device.type == "cuda" and x_TD.dtype != torch.float32:
            return torch.mm(x_TD, weight_VD.t(), out_dtype=torch.float32)
        return F.linear(x_TD.float(), weight_VD.float())


def is_bf16_on_cpu(x: Tensor) -> bool:
    """Returns whether x is in bf16 on a CPU with instructions for it."""
    on_cpu = HAS_ONEDNN and x.device.type == "cpu"
    return on_cpu and x.dtype == torch.bfloat16 and multiplies_bf16()


class RoundedWeight:
    """A weight [V, D], rounded once to the precision of products and used by several of them."""

    def __init__(self, weight_VD: Tensor, dtype: torch.dtype) -> None:
        """Rounds the weight; it must not change while this is used."""
        self.factor_VD = weight_VD.detach().to(dtype)
        self._packed: PackedWeight | None = None
        if is_bf16_on_cpu(self.factor_VD) and PackedWeightBF16.can_pack(self.factor_VD):
            self._packed = PackedWeightBF16(self.factor_VD, None)

    def multiply(self, factor_TD: Tensor) -> Tensor:
        """Returns factor · weightᵀ [T, V], summed in fp32; without gradient."""
        if self._packed is not None:
            return self._packed(factor_TD)
        return linear_in_fp32(factor_TD, self.factor_VD)


def multiply_gradient(grad_TV: Tensor, weight_VD: Tensor) -> Tensor:
    """Returns grad · weight [T, D], the gradient of a product's input, summed in fp32.

    In bf16 on a CPU the sums are rounded once.
    """
    if is_bf16_on_cpu(grad_TV):
        return linear_onednn(grad_TV, weight_VD.t())
    return linear_in_fp32(grad_TV, weight_VD.t())


def sum_dtype(x: Tensor) -> torch.dtype:
    """Returns the precision of sums of such numbers: fp32, or fp64 if they are fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def matmul_in_fp32(x: Tensor, y: Tensor) -> Tensor:
    """Returns x [..., M, K] · y [..., K, N] as [..., M, N], summed in fp32 or better."""
    with torch.autocast(x.device.type, enabled=False):
        return x.to(sum_dtype(x)) @ y.to(sum_dtype(y))


def compute_dtype(x: Tensor) -> torch.dtype:
    """Returns the precision of a product's factors: autocast's if it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class WideProduct(torch.autograd.Function):
    """Computes x · weightᵀ in fp32 from rounded factors; sums the weight's gradient in fp32 too."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, factor_dtype: torch.dtype) -> Tensor:
        rounded, factor_TD = RoundedWeight(weight_VD, factor_dtype), x_TD.to(factor_dtype)
        ctx.save_for_backward(factor_TD, rounded.factor_VD)
        ctx.dtypes = x_TD.dtype, weight_VD.dtype
        return rounded.multiply(factor_TD)

    @staticmethod
    def backward(ctx: Any, grad_TV: Tensor) -> tuple[Tensor | None, ...]:
        factor_TD, factor_VD = ctx.saved_tensors
        grad_TV = grad_TV.to(factor_VD.dtype)
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            to_x = multiply_gradient(grad_TV, factor_VD).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            to_weight = linear_in_fp32(grad_TV.t(), factor_TD.t()).to(ctx.dtypes[1])
        return to_x, to_weight, None


def wide_product(x: Tensor, weight_VD: Tensor) -> Tensor:
    """Returns x · weightᵀ [..., V] in fp32, from factors in autocast's precision if it is on."""
    y_TV: Tensor = WideProduct.apply(  # type: ignore[no-untyped-call]
        x.reshape(-1, x.shape[-1]), weight_VD, compute_dtype(x)
    )
    return y_TV.view(*x.shape[:-1], -1)


def add_to_gradient(grad_VD: Tensor, grad_TV: Tensor, x_TD: Tensor) -> None:
    """Adds gradᵀ · x to an fp32 gradient; sums in fp32 whatever the precision of grad and x."""
    if grad_TV.dtype == grad_VD.dtype:
        grad_VD.addmm_(grad_TV.t(), x_TD)
    elif is_bf16_on_cpu(grad_TV) and can_accumulate_bf16(grad_VD):
        accumulate_product_bf16(grad_VD, grad_TV, x_TD)
    else:
        grad_VD.add_(linear_in_fp32(grad_TV.t(), x_TD.t()))


def linear_add_onednn(
    total: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Computes total + x · weightᵀ + bias on a CPU, without gradient; see `linear_onednn`."""
    if compute_dtype(x) != torch.float32:
        return total + linear_onednn(x, weight, bias)
    y: Tensor = _mkldnn._linear_pointwise.binary(x, total, weight, bias, "add")
    return y


def accumulate_weight_gradient(weight: Tensor, grad_TO: Tensor, x_TI: Tensor) -> Tensor | None:
    """Returns a weight's gradient; None if it was added in place to one that the weight had.

    Micro-batches add up their gradients; in place, no separate gradient is written to memory.
    grad and x have the same precision.
    """
    if weight.grad is not None:
        add_to_gradient(weight.grad, grad_TO, x_TI)
        return None
    if grad_TO.dtype == weight.dtype:
        return grad_TO.t() @ x_TI
    gradient = torch.zeros_like(weight)
    add_to_gradient(gradient, grad_TO, x_TI)
    return gradient


class LinearFunction(torch.autograd.Function):
    """Computes a linear layer and its input's gradient with oneDNN; its weight's with torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.dtype, factor = x.dtype, x.to(compute_dtype(x))
        ctx.save_for_backward(factor, weight)
        return linear_onednn(factor, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_TO = grad.reshape(-1, grad.shape[-1])
        return (
            linear_onednn(grad_TO, weight.t()).view(x.shape).to(ctx.dtype) if needs_x else None,
            accumulate_weight_gradient(weight, grad_TO, x.reshape(-1, x.shape[-1]))
            if needs_weight
            else None,
            grad_TO.sum(dim=0, dtype=torch.float32) if needs_bias else None,
        )


def linear_with_gradient(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes x · weightᵀ + bias with oneDNN, with gradient."""
    y: Tensor = LinearFunction.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


def make_linear_forwards(model: nn.Module) -> dict[nn.Module, ModuleForward]:
    """Returns a forward with oneDNN and gradient for each linear layer that suits it."""
    return {
        layer: partial(linear_with_gradient, weight=layer.weight, bias=layer.bias)
        for layer in find_linear_layers(model)
    }


class PackedLinear:
    """Computes linear layers of the same input together, from one packed copy of their weights.

    The speed of a product with few rows, as in decoding, depends on how fast the weights are read;
    the copy has the best layout for that. Without gradient. The layers' weights must not change
    while it is used.
    """

    def __init__(self, rows: int, *layers: nn.Linear) -> None:
        """rows: the usual number of rows of the input, for which the weights are packed."""
        whole = torch.cat([layer.weight.detach() for layer in layers])
        bias: Tensor | None = None
        if any(layer.bias is not None for layer in layers):
            zeros = whole.new_zeros
            biases = [zeros(x.out_features) if x.bias is None else x.bias.detach() for x in layers]
            bias = torch.cat(biases)
        kind = PackedWeightBF16 if torch.is_autocast_enabled("cpu") else PackedWeight
        self.packed = kind(whole, bias) if kind.can_pack(whole) else None
        if self.packed is None:
            whole = whole.to(compute_dtype(whole))
            self.weight, self.bias = _mkldnn._reorder_linear_weight(whole, rows), bias

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the outputs of all layers, concatenated in the last dimension, in fp32."""
        if self.packed is None:
            return linear_onednn(x, self.weight, self.bias).float()
        return self.packed(x)

    def add_product(self, total: Tensor, x: Tensor) -> Tensor:
        """Returns total plus the outputs of all layers."""
        if self.packed is None:
            return linear_add_onednn(total, x, self.weight, self.bias)
        return self.packed(x, total)


def make_packed_forwards(rows: int, layers: Iterable[nn.Linear]) -> dict[nn.Module, ModuleForward]:
    """Returns for each layer a forward with a packed copy of its weights; see `PackedLinear`."""
    return {layer: PackedLinear(rows, layer) for layer in layers}


def find_linear_layers(model: nn.Module) -> list[nn.Linear]:
    """Returns the linear layers that oneDNN can compute.

    Subclasses of nn.Linear are left out, because they may compute something else.
    """
    linear = [layer for layer in model.modules() if type(layer) is nn.Linear]
    return [layer for layer in linear if suits_onednn(layer.weight)]


@contextmanager
def computed_as(forwards: Mapping[nn.Module, ModuleForward]) -> Iterator[None]:
    """Within it, these modules use these functions as their forward."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, previous in before.items():
            del module.forward  # so that the class's forward is used
            if previous is not None:
                module.forward = previous
