"""Estimates memory needs, and from them how many tokens can be computed at once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from grpo.errors import ConfigError
from grpo.memory.budget import Budget
from grpo.models.forward import Completions
from grpo.models.head import CHUNK_LOGITS
from grpo.models.load import LanguageModel
from grpo.models.precision import count_frozen_bytes, count_rounded_bytes, find_linear_weights
from grpo.models.recompute import find_decoder_layers

CGROUP_LIMIT_FILES = (  # a container's own limit
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
EFFICIENT_TOKENS = {"cpu": 1024, "mps": 4096, "cuda": 16384}  # enough for the fastest products
EFFICIENT_POSITIONS = {"cpu": 2**15, "mps": 2**17, "cuda": 2**40}  # enough for fastest decoding
USABLE_SHARE = {"cpu": 0.8, "mps": 0.9, "cuda": 0.9}  # of the total memory
LIBRARIES_GB = {"cpu": 0.7, "mps": 0.0, "cuda": 0.0}  # count in a process's peak, not in a GPU's
OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2}  # for each trained weight
# Memory in a forward and backward pass, relative to what is kept between the two.
ACTIVATION_OVERHEAD = 1.25
# On a CPU the rounded copies of weights are made and freed between activations of other sizes, and
# the heap keeps freed memory (`allocator`): bytes held for each byte in use (`scripts/bench`).
HEAP_OVERHEAD_IN_BF16 = 1.6
PROBE_TOKENS = 64  # tokens of the smaller of two forward passes that are compared


@dataclass(frozen=True)
class Workload:
    """The settings of a run on which its memory depends."""

    prompt: int  # tokens of the longest prompt
    completion: int  # tokens of the longest completion
    group: int  # completions a prompt
    optimizer: str  # a key of OPTIMIZER_BYTES
    reference: bool  # whether a frozen copy of the model is held too
    reference_moves: bool  # then the copy is in fp32
    shards: int = 1  # processes among which the weights are divided
    offload: bool = False  # each process keeps its part in the CPU's memory
    ahead: bool = False  # the next rollout is sampled from a copy, during the update

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and completion."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class MemoryNeeds:
    """The fixed memory in GB, and the memory of each token in bytes."""

    training_gb: float  # weights, reference, gradients, optimizer, a chunk of the head's logits
    sampling_gb: float  # weights and their packed copies, reference, optimizer
    token_bytes: float  # kept for the backward pass
    position_bytes: float  # of a position in a rollout's cache, with its share of a row's logits


def estimate_memory(policy: LanguageModel, work: Workload) -> MemoryNeeds:
    """Returns the memory that training the policy with this workload needs."""
    model, dtype = policy.model, policy.device.autocast_dtype
    weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    trained = sum(x.numel() for x in model.parameters() if x.requires_grad)
    held = weights + trained * OPTIMIZER_BYTES[work.optimizer]
    if work.reference:
        held += weights if work.reference_moves else count_frozen_bytes(model, dtype)
    if work.ahead:
        held += 4 * trained
    on_cpu = policy.device.torch_device.type == "cpu"
    fast_bf16 = policy.device.has_fast_bf16
    heap = HEAP_OVERHEAD_IN_BF16 if on_cpu and dtype is not None and not fast_bf16 else 1.0
    copies = 0.0 if fast_bf16 else heap * count_rounded_bytes(model, dtype)
    chunk = 3 * 4 * CHUNK_LOGITS[policy.device.torch_device.type]
    head = chunk + count_head_bytes(policy)
    laid_out = weights if dtype is None and on_cpu else copies
    if fast_bf16:
        laid_out = 2.0 * sum(x.numel() for x in find_linear_weights(model))
    gathered = whole = 0.0
    if work.shards > 1:
        held, copies = (0.0 if work.offload else held / work.shards), 0.0
        gathered, whole = count_gathered_bytes(policy)
    gradients = 0.0 if work.offload else 4 * trained / work.shards
    row = 12 * policy.head.vocabulary  # its logits, and the tensors computed from them
    return MemoryNeeds(
        training_gb=(held + copies + gradients + gathered + head) / 1e9,
        sampling_gb=(held + whole + laid_out) / 1e9,
        token_bytes=heap * ACTIVATION_OVERHEAD * estimate_token_bytes(policy, work)
        if trained
        else 0.0,
        position_bytes=count_cache_bytes(policy) + row / work.completion,
    )


def count_gathered_bytes(policy: LanguageModel) -> tuple[float, float]:
    """Returns what a process gathers of divided weights: for training, and for sampling.

    For training these are the weights that are in no layer, with their gradients, and two layers;
    for sampling all weights, as `sharding.Sharding` stores them.
    """
    rounded = (policy.device.autocast_dtype or torch.float32).itemsize
    layers = [sum(x.numel() for x in m.parameters()) for m in find_decoder_layers(policy.model)]
    rest = sum(x.numel() for x in policy.model.parameters()) - sum(layers)
    largest = max(layers, default=0)
    return 8.0 * rest + 2 * rounded * largest, 4.0 * rest + rounded * sum(layers)


def count_head_bytes(policy: LanguageModel) -> int:
    """Returns the bytes that the head's weight [V, D] needs besides itself when it is used.

    These are an fp32 gradient if it is trained, and a copy if autocast rounds it.
    """
    weight = cast(Tensor, policy.head.linear.weight)
    dtype = policy.device.autocast_dtype or weight.dtype
    copy = 0 if weight.dtype == dtype else dtype.itemsize
    copy += dtype.itemsize if policy.device.has_fast_bf16 else 0  # in the kernel's layout
    return weight.numel() * (copy + (4 if weight.requires_grad else 0))


_token_bytes: dict[tuple[object, ...], float] = {}  # a sweep's jobs train the same model


def estimate_token_bytes(policy: LanguageModel, work: Workload) -> float:
    """Returns the bytes a token that a forward pass keeps for its backward, in the run's groups.

    Measured once a process for each model, device and workload.
    """
    parameters = [
        (n, x.shape, x.dtype, x.requires_grad) for n, x in policy.model.named_parameters()
    ]
    settings = (policy.device, policy.forward, policy.recompute, work)
    key = (policy.model.config.to_json_string(), *settings, *parameters)
    if key not in _token_bytes:
        _token_bytes[key] = measure_token_bytes(policy, work)
    return _token_bytes[key]


def measure_token_bytes(policy: LanguageModel, work: Workload) -> float:
    """Measures the bytes a token from two forward passes: their difference, over their tokens'.

    The difference leaves out what both keep, such as the weights that autocast has rounded.
    """
    share = PROBE_TOKENS / (work.prompt + work.group * work.completion)
    prompt, completion = (max(2, round(n * share)) for n in (work.prompt, work.completion))
    tokens = prompt + work.group * completion
    twice = measure_kept_bytes(policy, 2 * prompt, 2 * completion, work.group)
    return (twice - measure_kept_bytes(policy, prompt, completion, work.group)) / tokens


def measure_kept_bytes(policy: LanguageModel, prompt: int, completion: int, group: int) -> int:
    """Returns the bytes that a forward pass over one prompt's group keeps for its backward."""
    weights = {x.untyped_storage().data_ptr() for x in policy.model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(x: Tensor) -> None:
        """Keeps the memory, but no tensor: a pass that keeps its own output is never freed."""
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage

    device = policy.device.torch_device
    prompts_BP = torch.zeros(1, prompt, dtype=torch.int64, device=device)
    tokens_NC = torch.zeros(group, completion, dtype=torch.int64, device=device)
    lengths_B = torch.tensor([prompt], device=device)
    batch = Completions(prompts_BP, lengths_B, tokens_NC, tokens_NC == 0)
    with torch.enable_grad(), saved_tensors_hooks(note, lambda kept: kept):
        policy.compute_features(batch)
    return sum(storage.nbytes() for storage in kept.values())


def count_cache_bytes(policy: LanguageModel) -> float:
    """Returns the bytes of a token's keys and values in all layers."""
    config = policy.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0.0  # a state-space model: its state doesn't grow
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    heads = getattr(config, "num_key_value_heads", None) or heads
    in_fp32 = policy.device.has_fast_bf16  # its attention is in fp32
    size = ((None if in_fp32 else policy.device.autocast_dtype) or torch.float32).itemsize
    return float(2 * size * config.num_hidden_layers * heads * width)


def get_total_memory(device: torch.device) -> float:
    """Returns the GB of the GPU, or of the machine; a container's limit, if that is lower."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    if device.type == "mps":
        return torch.mps.recommended_max_memory() / 1e9
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in CGROUP_LIMIT_FILES:
        if file.is_file() and file.read_text().strip().isdigit():
            limits.append(int(file.read_text()))
    return min(limits) / 1e9


def get_usable_memory(device: torch.device, limit: float | None) -> float:
    """Returns the GB that a run may use. limit: device.memory_gb; None: a share of the total."""
    return USABLE_SHARE[device.type] * get_total_memory(device) if limit is None else limit


def choose_budget(
    device: torch.device,
    memory: float | None,
    tokens: int | None,
    cache_positions: int | None,
    memory_needs: MemoryNeeds,
    longest: int,
    processes: int = 1,
    overlaps: bool = False,
) -> Budget:
    """Chooses token limits that fit into memory, and are no larger than is efficient.

    Args:
        memory: device.memory_gb; None takes USABLE_SHARE of the total memory.
        tokens: the limit of a forward and backward pass; None derives it from memory.
        cache_positions: the limit of a rollout's cache; None derives it from memory.
        longest: tokens of the longest prompt and completion together.
        processes: that share this memory evenly.
        overlaps: update and rollout run at the same time, and share what the weights leave.

    Raises:
        ConfigError: not even one completion fits, and `tokens` is None.
    """
    usable = get_usable_memory(device, memory) / processes
    base = LIBRARIES_GB[device.type] + memory_needs.training_gb
    needed = base + memory_needs.token_bytes * longest / 1e9
    if tokens is None and usable < needed:
        value = f"null ({usable:.1f} GB here)" if memory is None else f"{memory:g}"
        if processes > 1:
            value += f" for {processes} processes"
        raise ConfigError(
            f"device.memory_gb={value}: libraries, weights, gradients, optimizer and one "
            f"completion with its prompt, up to {longest} tokens, take {needed:.1f} GB; raise it "
            f"to that, or reduce what is needed: "
            f"device.gradient_checkpointing=true, optim.name=adamw_8bit, adapter=lora.",
            key="device.memory_gb",
            value=value,
        )
    room = usable - LIBRARIES_GB[device.type] - memory_needs.sampling_gb
    if overlaps:
        room = max(0.0, min(room, usable - base)) / 2
        usable -= room
    most = tokens or int((usable - base) * 1e9 / max(memory_needs.token_bytes, 1.0))
    positions = min(
        EFFICIENT_POSITIONS[device.type], int(max(0.0, room) * 1e9 / memory_needs.position_bytes)
    )
    budget = Budget.from_tokens(most, max(longest, cache_positions or positions))
    budget.forward_limit.tokens = tokens or min(most, EFFICIENT_TOKENS[device.type])
    budget.configured = (memory, tokens, cache_positions)
    return budget
