"""In what precision frozen weights are kept, and a model in 4 bits is tried."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LINEAR_TYPES = (nn.Linear, Conv1D)  # their weights are rounded by autocast at every use


@torch.no_grad()
def store_frozen_weights(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Keeps weights that are never trained in the precision that they are computed in.

    Under autocast the model's numbers stay what they are. Weights of products are rounded once,
    instead of at every use. A table is rounded where nothing of it is lost, and what is looked up
    in it is fp32 all the same.

    Args:
        dtype: autocast's; None, where it is off, leaves everything as it is.
    """
    if dtype is None:
        return
    exact, wide = find_exact_embeddings(model, dtype), find_unrounded_weights(model, dtype)
    for module in [x for x in model.modules() if type(x) in LINEAR_TYPES]:
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.requires_grad:
                continue
            if id(weight) in wide:  # tied to a table that stays as it is
                setattr(module, name, nn.Parameter(weight.to(dtype), requires_grad=False))
            else:
                weight.data = weight.data.to(dtype)
    for table in exact:
        table.weight.data = table.weight.data.to(dtype)
        table.register_forward_hook(cast_output_to_fp32)


def find_exact_embeddings(model: nn.Module, dtype: torch.dtype) -> list[nn.Embedding]:
    """Lookup tables of which nothing is lost in a lower precision."""
    tables = [x for x in model.modules() if type(x) is nn.Embedding]
    return [x for x in tables if torch.equal(x.weight.to(dtype).float(), x.weight)]


def find_unrounded_weights(model: nn.Module, dtype: torch.dtype) -> set[int]:
    """The ids of the weights that have to stay as they are, whoever else they are tied to."""
    others = [x for x in model.modules() if type(x) not in LINEAR_TYPES]
    wide = {id(weight) for module in others for weight in module.parameters(recurse=False)}
    return wide - {id(table.weight) for table in find_exact_embeddings(model, dtype)}


def count_frozen_bytes(model: nn.Module, dtype: torch.dtype | None) -> int:
    """What a frozen copy of a model takes, as `store_frozen_weights` keeps it."""
    weights = {id(x): x for x in (*model.parameters(), *model.buffers())}
    if dtype is None:
        return sum(x.nbytes for x in weights.values())
    wide = find_unrounded_weights(model, dtype) | {id(x) for x in model.buffers()}
    tied = {id(w): w for w in find_linear_weights(model) if id(w) in wide}
    return sum(
        x.nbytes if n in wide else x.numel() * dtype.itemsize for n, x in weights.items()
    ) + sum(x.numel() * dtype.itemsize for x in tied.values())


def count_rounded_bytes(model: nn.Module, dtype: torch.dtype | None) -> int:
    """What autocast's rounded copies of a model's weights take, the head's left out."""
    if dtype is None:
        return 0
    head = model.get_output_embeddings()  # type: ignore[operator]
    of_head = {id(x) for x in head.parameters()}
    rounded = {id(x): x for x in find_linear_weights(model) if id(x) not in of_head}
    return sum(x.numel() * dtype.itemsize for x in rounded.values() if x.dtype == torch.float32)


def find_linear_weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of its products."""
    products = [x for x in model.modules() if type(x) in LINEAR_TYPES]
    return [weight for module in products for weight in module.parameters(recurse=False)]


def cast_output_to_fp32(module: nn.Module, inputs: Any, looked_up: Tensor) -> Tensor:
    """A forward hook of a table."""
    return looked_up.float()


@contextmanager
def four_bits_in_fp32(model: nn.Module) -> Iterator[None]:
    """Within it, products with weights in 4 bits are computed in fp32, whatever they are set to."""
    layers: list[Any] = [x for x in model.modules() if type(x).__name__ == "Linear4bit"]
    before = [layer.compute_dtype for layer in layers]
    try:
        for layer in layers:
            layer.compute_dtype = torch.float32
        yield
    finally:
        for layer, dtype in zip(layers, before, strict=True):
            layer.compute_dtype = dtype
