"""Activations made again in the backward pass instead of kept: less memory, one more forward.

transformers' own checkpointing acts in training mode alone, where some models' dropout lives too,
and drops the key-value cache that a shared prompt needs. So each decoder layer is wrapped here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer


def recomputable(model: nn.Module) -> list[nn.Module]:
    """Its decoder layers."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Within it, the decoder layers of a forward pass keep their inputs and nothing else."""
    layers = recomputable(model)
    for layer in layers:
        layer.forward = partial(recompute_layer, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


def recompute_layer(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """One layer's forward, run again in the backward pass from the cache as it was before."""
    cache = next((v for v in (*inputs, *named.values()) if isinstance(v, Cache)), None)
    if cache is None:
        return run_again(forward, *inputs, **named)
    before, after, first = list(cache.layers), dict[int, Any](), True

    def with_own_cache(*inputs: Any, **named: Any) -> Any:
        own = copy.copy(cache)

        def grow(keys: Any, values: Any, index: int, *rest: Any, **more: Any) -> Any:
            layer = copy.copy(before[index])
            grown = layer.update(keys, values, *rest, **more)
            if first:  # what the second run makes is not kept
                after[index] = layer
            return grown

        own.update = grow
        swapped = [own if value is cache else value for value in inputs]
        return forward(*swapped, **{k: own if v is cache else v for k, v in named.items()})

    result = run_again(with_own_cache, *inputs, **named)
    first = False
    for index, layer in after.items():
        cache.layers[index] = layer
    after.clear()
    return result


def run_again(function: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **named)
