"""FSDP (2304.11277) for a model of transformers, by torch's `fully_shard`.

Each process keeps its rows of every weight, of the gradient and of the optimizer's state. A decoder
layer's weights are gathered while the layer is computed; what is in no layer (embeddings, last
norm, head) stays gathered for a micro-batch.
"""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from grpo.device import Device
from grpo.errors import ConfigError
from grpo.models.adapter import ADAPTER_WEIGHTS, POLICY_ADAPTER, has_adapter
from grpo.models.recompute import find_decoder_layers
from grpo.models.sharded import get_local_part, is_sharded, select_local_part


def shard_model(model: PreTrainedModel, device: Device, offload: bool) -> None:
    """Divides a model's weights among all processes; each keeps its part of every weight.

    Layers are gathered and computed in autocast's precision, the rest is gathered in its own.
    Gradients are summed over the processes in fp32.
    """
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.torch_device.type, (dist.get_world_size(),)),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    in_layers = MixedPrecisionPolicy(
        param_dtype=device.autocast_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in find_decoder_layers(model):
        fully_shard(layer, mp_policy=in_layers, **options)
    # The head, which is computed after the forward pass, needs its weight until the backward pass.
    fully_shard(model, reshard_after_forward=False, **options)
    model.run_base = MethodType(run_base, model)
    register_fsdp_forward_method(model, "run_base")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # a sum, as losses are divided by the whole step
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
            module.set_reduce_scatter_unused_params(True)  # a pass without a loss reaches no head


def run_base(model: PreTrainedModel, **named: Any) -> Any:
    """Runs the model without its head; FSDP then gathers the weights that belong to no layer."""
    return model.base_model(**named)


def release_gathered(model: nn.Module) -> None:
    """Frees the gathered weights that belong to no layer, which the optimizer would make stale."""
    if is_sharded(model):
        model.reshard()  # type: ignore[operator]


def gather_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns the whole weights on the first process's CPU, and nothing on the others.

    Of a model with an adapter, only the adapter's. All processes call it together.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=has_adapter(model)
    )
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    names = {name for name, _ in model.named_parameters()}  # a tied weight has one
    names |= {name for name, _ in model.named_buffers()}
    return {name: weight for name, weight in weights.items() if name in names}


@torch.no_grad()
def restore_parts(model: PreTrainedModel, folder: Path, trust_remote_code: bool) -> None:
    """Loads this process's part of the weights that `LanguageModel.save` wrote.

    Raises:
        ConfigError: the adapter in the folder has other weights than the model's.
    """
    if has_adapter(model):
        from safetensors.torch import load_file

        saved = load_file(folder / ADAPTER_WEIGHTS)
        trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
        wanted = {
            name: f"base_model.model.{name.replace(f'.{POLICY_ADAPTER}.', '.')}" for name in trained
        }
        if set(wanted.values()) != set(saved):
            raise ConfigError(f"{folder}: this adapter belongs to another model.")
    else:
        whole = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
        saved = whole.state_dict()
        wanted = {name: name for name, _ in model.named_parameters()}
    for name, weight in model.named_parameters():
        if name in wanted:
            get_local_part(weight).copy_(select_local_part(saved[wanted[name]], weight))
