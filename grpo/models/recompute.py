"""Activations made again in the backward pass instead of kept: less memory, one more forward.

transformers' own checkpointing acts in training mode alone, where some models' dropout lives too.
So each decoder layer is wrapped here.
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
    """Its decoder layers."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


@contextmanager
def recomputed(model: PreTrainedModel) -> Iterator[None]:
    """Within it, the decoder layers of a forward pass keep their inputs and nothing else."""
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
    """A layer's forward, run again in the backward pass with the attention and products it had."""
    attention = config._attn_implementation

    def as_it_was(*inputs: Any, **named: Any) -> Any:
        with attention_as(config, attention), fast_forward_pass(layer):
            return forward(*inputs, **named)

    return checkpoint(as_it_was, *inputs, use_reentrant=False, preserve_rng_state=False, **named)
