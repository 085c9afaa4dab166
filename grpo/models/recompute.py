"""Gradient checkpointing: recomputes activations in the backward pass, which saves memory.

transformers' own checkpointing works only in training mode, which also turns on the dropout of some
models. So each decoder layer is wrapped here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo.models.attention_plan import attention_as
from grpo.models.cpu.linear import computed_as
from grpo.models.cpu.select import fast_forward_pass


def find_decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the model's decoder layers."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


@contextmanager
def recomputed(model: PreTrainedModel) -> Iterator[None]:
    """Within it, decoder layers keep only their inputs for the backward pass."""
    config = model.config.get_text_config()
    layers = find_decoder_layers(model)
    with computed_as({x: partial(run_recomputed, config, x, x.forward) for x in layers}):
        yield


def run_recomputed(
    config: PreTrainedConfig,
    layer: nn.Module,
    forward: Callable[..., Any],
    *inputs: Any,
    **named: Any,
) -> Any:
    """Runs a layer's forward, and again in the backward pass with the same attention and products.

    Args:
        forward: the layer's forward before it was replaced by this function.
    """
    attention = config._attn_implementation

    def run(*inputs: Any, **named: Any) -> Any:
        with attention_as(config, attention), fast_forward_pass(layer):
            return forward(*inputs, **named)

    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False, **named)
