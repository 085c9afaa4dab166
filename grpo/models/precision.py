"""Stores frozen weights in the precision of computation, and counts the bytes of such copies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LINEAR_TYPES = (nn.Linear, Conv1D)  # autocast rounds their weights at every use


@torch.no_grad()
def store_frozen_weights(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Stores weights that are never trained in the precision that they are computed in.

    Under autocast the model's output stays the same. Weights of matrix products are rounded once
    instead of at every use. An embedding is rounded only if that loses nothing, and its output
    stays fp32.

    Args:
        dtype: autocast's; None, if autocast is off, changes nothing.
    """
    if dtype is None:
        return
    exact, wide = find_exact_embeddings(model, dtype), find_unrounded_weights(model, dtype)
    for module in [x for x in model.modules() if type(x) in LINEAR_TYPES]:
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.requires_grad:
                continue
            if id(weight) in wide:  # tied to an embedding that stays in fp32
                setattr(module, name, nn.Parameter(weight.to(dtype), requires_grad=False))
            else:
                weight.data = weight.data.to(dtype)
    for table in exact:
        table.weight.data = table.weight.data.to(dtype)
        table.register_forward_hook(cast_output_to_fp32)


def find_exact_embeddings(model: nn.Module, dtype: torch.dtype) -> list[nn.Embedding]:
    """Returns the embeddings whose weights are exact in the lower precision."""
    tables = [x for x in model.modules() if type(x) is nn.Embedding]
    return [x for x in tables if torch.equal(x.weight.to(dtype).float(), x.weight)]


def find_unrounded_weights(model: nn.Module, dtype: torch.dtype) -> set[int]:
    """Returns the id() of weights that must not be rounded, even if a linear layer shares them."""
    others = [x for x in model.modules() if type(x) not in LINEAR_TYPES]
    wide = {id(weight) for module in others for weight in module.parameters(recurse=False)}
    return wide - {id(table.weight) for table in find_exact_embeddings(model, dtype)}


def count_frozen_bytes(model: nn.Module, dtype: torch.dtype | None) -> int:
    """Returns the bytes of a frozen copy of a model, as `store_frozen_weights` stores it."""
    weights = {id(x): x for x in (*model.parameters(), *model.buffers())}
    if dtype is None:
        return sum(x.nbytes for x in weights.values())
    wide = find_unrounded_weights(model, dtype) | {id(x) for x in model.buffers()}
    tied = {id(w): w for w in find_linear_weights(model) if id(w) in wide}
    return sum(
        x.nbytes if n in wide else x.numel() * dtype.itemsize for n, x in weights.items()
    ) + sum(x.numel() * dtype.itemsize for x in tied.values())


def count_rounded_bytes(model: nn.Module, dtype: torch.dtype | None) -> int:
    """Returns the bytes of autocast's rounded copies of a model's weights, without the head's."""
    if dtype is None:
        return 0
    head = model.get_output_embeddings()  # type: ignore[operator]
    head_ids = {id(x) for x in head.parameters()}
    rounded = {id(x): x for x in find_linear_weights(model) if id(x) not in head_ids}
    return sum(x.numel() * dtype.itemsize for x in rounded.values() if x.dtype == torch.float32)


def find_linear_weights(model: nn.Module) -> list[nn.Parameter]:
    """Returns the weights and biases of the model's linear layers."""
    layers = [x for x in model.modules() if type(x) in LINEAR_TYPES]
    return [weight for layer in layers for weight in layer.parameters(recurse=False)]


def cast_output_to_fp32(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Casts an embedding's output to fp32; a forward hook."""
    return output.float()


@contextmanager
def four_bits_in_fp32(model: nn.Module) -> Iterator[None]:
    """Within it, layers with 4-bit weights compute in fp32, whatever their setting."""
    layers: list[Any] = [x for x in model.modules() if type(x).__name__ == "Linear4bit"]
    before = [layer.compute_dtype for layer in layers]
    try:
        for layer in layers:
            layer.compute_dtype = torch.float32
        yield
    finally:
        for layer, dtype in zip(layers, before, strict=True):
            layer.compute_dtype = dtype
