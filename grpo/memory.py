"""From memory in GB to how many tokens are computed at once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from grpo.budget import Budget
from grpo.errors import ConfigError
from grpo.models.forward import Completions
from grpo.models.head import CHUNK_LOGITS
from grpo.models.load import LanguageModel

CGROUP = (  # a container's own limit
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
ENOUGH = {"cpu": 1024, "mps": 4096, "cuda": 16384}  # tokens at which products are at their fastest
ENOUGH_CACHED = 32768  # positions at which decoding is
SHARE = {"cpu": 0.8, "mps": 0.9, "cuda": 0.9}  # of the memory there is
LIBRARIES_GB = {"cpu": 0.7, "mps": 0.0, "cuda": 0.0}  # part of a process's peak, and of no GPU's
OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2}  # a trained weight
BESIDE = 1.25  # what is kept for the backward pass, and what is made beside it for a while


@dataclass(frozen=True)
class Held:
    """GB that are held whatever is computed, and bytes for each token that is."""

    training: float  # weights, reference, gradients, optimizer, a chunk of the head's logits
    sampling: float  # weights, laid out too, reference, optimizer
    token: float  # kept for the backward pass
    position: float  # kept while completions are written


def held_by(
    policy: LanguageModel, max_new_tokens: int, optimizer: str, with_reference: bool
) -> Held:
    """What training a model takes.

    with_reference: a frozen copy of it is held as well.
    """
    model = policy.model
    weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    trained = sum(x.numel() for x in model.parameters() if x.requires_grad)
    held = weights * (2 if with_reference else 1) + trained * OPTIMIZER_BYTES[optimizer]
    head = (
        3 * 4 * CHUNK_LOGITS[policy.device.torch_device.type]
        + 4 * policy.head.vocabulary * model.config.get_text_config().hidden_size
    )
    return Held(
        training=(held + 4 * trained + head) / 1e9,
        sampling=(held + weights) / 1e9,
        token=BESIDE * kept_by_token(policy) if trained else 0.0,
        position=cached_by_position(policy) + 12 * policy.head.vocabulary / max_new_tokens,
    )


_kept: dict[tuple[object, ...], float] = {}  # a sweep's jobs train the same model


def kept_by_token(policy: LanguageModel) -> float:
    """Bytes that a forward pass keeps for its backward, measured on a few tokens.

    Once a process for models alike in everything that it depends on.
    """
    parameters = [
        (n, x.shape, x.dtype, x.requires_grad) for n, x in policy.model.named_parameters()
    ]
    how = (policy.device, policy.forward, policy.recompute)
    alike = (policy.model.config.to_json_string(), *how, *parameters)
    if alike not in _kept:
        _kept[alike] = measured_by_token(policy)
    return _kept[alike]


def measured_by_token(policy: LanguageModel) -> float:
    """As `kept_by_token`, now."""
    weights = {x.untyped_storage().data_ptr() for x in policy.model.parameters()}
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    device, half = policy.device.torch_device, 48
    tokens = torch.zeros(1, half, dtype=torch.int64, device=device)
    batch = Completions(tokens, torch.tensor([half], device=device), tokens, tokens == 0)
    with torch.enable_grad(), saved_tensors_hooks(note, lambda x: x):
        features = policy.features(batch)
        total = sum(kept.values())
    del features
    return total / (2 * half)


def cached_by_position(policy: LanguageModel) -> float:
    """Bytes of the keys and values of a token."""
    config = policy.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0.0  # a state-space model, whose state doesn't grow
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    heads = getattr(config, "num_key_value_heads", None) or heads
    return float(2 * 4 * config.num_hidden_layers * heads * width)


def memory_there_is(device: torch.device) -> float:
    """GB, of the GPU or of the machine; a container's limit where it has one."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    if device.type == "mps":
        return torch.mps.recommended_max_memory() / 1e9
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in CGROUP:
        if file.is_file() and file.read_text().strip().isdigit():
            limits.append(int(file.read_text()))
    return min(limits) / 1e9


def budget_of(
    device: torch.device, memory: float | None, tokens: int | None, held: Held, longest: int
) -> Budget:
    """As many tokens at once as memory holds, and no more than are of use.

    Args:
        memory: in GB; None for most of what there is.
        tokens: in one forward and backward pass, whatever memory says; None if that isn't given.
        longest: tokens of the longest prompt and completion.

    Raises:
        ConfigError: not even one completion fits.
    """
    there = SHARE[device.type] * memory_there_is(device) if memory is None else memory
    base = LIBRARIES_GB[device.type] + held.training
    needed = base + held.token * longest / 1e9
    if tokens is None and there < needed:
        given = f"null ({there:.1f} GB here)" if memory is None else f"{memory:g}"
        raise ConfigError(
            f"device.memory_gb={given}: libraries, weights, gradients, optimizer and one "
            f"completion with its prompt, up to {longest} tokens, take {needed:.1f} GB; give that "
            f"much, or take less: "
            f"device.gradient_checkpointing=true, optim.name=adamw_8bit, adapter=lora."
        )
    most = tokens or int((there - base) * 1e9 / max(held.token, 1.0))
    room = there - LIBRARIES_GB[device.type] - held.sampling
    positions = int(max(0.0, room) * 1e9 / held.position)
    budget = Budget.of(most, max(longest, min(ENOUGH_CACHED, positions)))
    budget.computed.tokens = tokens or min(most, ENOUGH[device.type])
    budget.asked = (memory, tokens)
    return budget
