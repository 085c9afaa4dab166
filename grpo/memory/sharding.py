"""Divides a policy's weights among processes, and gathers them to sample from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from grpo.memory.allocator import give_back_freed_memory
from grpo.models.adapter import copy_model
from grpo.models.fsdp import shard_model
from grpo.models.head import Head
from grpo.models.load import LanguageModel
from grpo.models.recompute import find_decoder_layers
from grpo.models.reference import Reference
from grpo.models.sharded import gather_whole, is_sharded


class Sharding:
    """A policy whose weights are divided, and the whole copy of them from which it samples.

    The copy holds weights only within `gathered`.
    """

    def __init__(self, policy: LanguageModel, offload: bool) -> None:
        """
        Args:
            offload: weights, gradients and optimizer state stay in the CPU's memory, and only what
                is being computed is on the GPU.
        """
        self.policy, self.offload = policy, offload
        # On a CPU the sampler rounds them itself, when it packs them.
        dtype = policy.device.autocast_dtype if policy.device.torch_device.type != "cpu" else None
        layers = find_decoder_layers(policy.model)
        in_layers = {id(weight) for layer in layers for weight in layer.parameters()}

        def copy_weight(weight: nn.Parameter) -> nn.Parameter:
            """Gives the copy a storage of its own, which can be freed."""
            stored = dtype if dtype is not None and id(weight) in in_layers else weight.dtype
            return nn.Parameter(weight.detach().to(stored, copy=True), requires_grad=False)

        whole = copy_model(policy.model, copy_weight)
        self.whole = replace(policy, model=whole, head=Head(whole))

    def divide_weights(self, reference: Reference | None) -> None:
        """Divides the weights of the policy and of its reference; the copy's are freed."""
        shard_model(self.policy.model, self.policy.device, self.offload)
        if reference is not None and reference.model.model is not self.policy.model:
            shard_model(reference.model.model, self.policy.device, self.offload)
        self._free()

    @contextmanager
    @torch.no_grad()
    def gathered(self) -> Iterator[None]:
        """Within it, the copy has the policy's weights. All processes enter and leave it together.

        Before `divide_weights`, it has them anyway.
        """
        if is_sharded(self.policy.model):
            parts = dict(self.policy.model.named_parameters())
            for name, weight in self.whole.model.named_parameters():
                weight.untyped_storage().resize_(weight.numel() * weight.element_size())
                weight.copy_(gather_whole(parts[name].detach().to(weight.dtype)))
        try:
            yield
        finally:
            if is_sharded(self.policy.model):
                self._free()

    def _free(self) -> None:
        for weight in self.whole.model.parameters():
            weight.untyped_storage().resize_(0)
        if self.policy.device.torch_device.type == "cpu":
            give_back_freed_memory()
