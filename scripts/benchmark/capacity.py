"""What GPUs are predicted to hold, and what the parts add up to by hand.

capacity.py MODEL full|lora OUT

The predictions are those that a run makes, here for models whose layers are counted up from one and
two, on a CPU by the branches that a GPU takes.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from settings import QWEN
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from grpo.device import open_device
from grpo.memory import estimate
from grpo.memory.estimate import USABLE_SHARE, MemoryNeeds, Workload, estimate_memory
from grpo.models import attention, head
from grpo.models.adapter import Adapter, add_adapter
from grpo.models.cpu import linear
from grpo.models.files import PACKAGE_FOLDER
from grpo.models.forward import forward_shared_prompt
from grpo.models.head import Head
from grpo.models.load import LanguageModel
from grpo.models.precision import store_frozen_weights

GPUS = (24, 80, 141)  # GB
PROMPT, COMPLETION, GROUP = 512, 1024, 8
VOCABULARY = 151936
LORA = Adapter(16, 32.0, "all-linear", rslora=False, dora=False, quantized=False)


def take_gpu_branches() -> None:
    """This process predicts for a GPU."""
    attention.has_fused_kernel = lambda x: False  # type: ignore[assignment]
    linear.HAS_ONEDNN = False
    head.CHUNK_LOGITS["cpu"] = head.CHUNK_LOGITS["cuda"]
    estimate.HEAP_OVERHEAD_IN_BF16 = 1.0


def build_zero_model(
    name: str, layers: int, vocabulary: int, lora: bool, recompute: bool
) -> LanguageModel:
    """Weights of no value, as many as a model of so many layers and tokens has."""
    _, hidden, width, heads, kv_heads, tied = QWEN[name]
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=width,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    model = model.to_empty(device="cpu").eval()
    model.tie_weights()
    with torch.no_grad():
        for weight in (*model.parameters(), *model.buffers()):
            weight.zero_()
    device = open_device("cpu", "bf16")
    if lora:
        store_frozen_weights(model.requires_grad_(False), device.autocast_dtype)
        add_adapter(model, LORA, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE_FOLDER / "tiny")
    own_head = Head(model)
    return LanguageModel(
        model, tokenizer, own_head, forward_shared_prompt, (0,), 2048, device, recompute=recompute
    )


def predict_memory(name: str, lora: bool, recompute: bool) -> MemoryNeeds:
    """Of the whole model, from what a layer more and a token more add to a small one."""
    work = Workload(PROMPT, COMPLETION, GROUP, "adamw", reference=not lora, reference_moves=False)
    estimates = []
    for layers, tokens in ((1, 1024), (2, 1024), (1, 2048)):
        estimates.append(
            astuple(estimate_memory(build_zero_model(name, layers, tokens, lora, recompute), work))
        )
        gc.collect()  # a model is a circle of references, and these are large
    small, deeper, wider = estimates
    layers, tokens = QWEN[name][0] - 1, (VOCABULARY - 1024) / 1024
    each = zip(small, deeper, wider, strict=True)
    return MemoryNeeds(*(a + layers * (b - a) + tokens * (c - a) for a, b, c in each))


def compute_by_hand(name: str, lora: bool) -> float:
    """GB of weights, their rounded copies, gradients, Adam's two moments and the reference."""
    layers, hidden, width, heads, kv_heads, tied = QWEN[name]
    head_width = hidden // heads
    qkv_width = (heads + 2 * kv_heads) * head_width
    layer = hidden * qkv_width + qkv_width + heads * head_width * hidden + 3 * hidden * width
    blocks, table = layers * layer, VOCABULARY * hidden
    if lora:
        sides = (hidden + heads * head_width) * 2 + (hidden + kv_heads * head_width) * 2
        trained = layers * LORA.rank * (sides + 3 * (hidden + width))
        tables = 2 * table * (1 if tied else 2)
        return (2 * blocks + tables + 16 * trained + 2 * trained) / 1e9
    weights = blocks + table * (1 if tied else 2)
    reference = 2 * weights
    return (16 * weights + 2 * blocks + reference) / 1e9


def main(name: str, lora: bool, out: Path) -> None:
    take_gpu_branches()
    kept, recomputed = predict_memory(name, lora, False), predict_memory(name, lora, True)
    needed = {
        key: held.training_gb + held.token_bytes * (PROMPT + COMPLETION) / 1e9
        for key, held in (("kept", kept), ("recomputed", recomputed))
    }
    figures: dict[str, Any] = {
        "by_hand_gb": compute_by_hand(name, lora),
        "weights_gb": kept.training_gb,
        "needed_gb": needed,
        "fits": {
            key: [gpu for gpu in GPUS if gigabytes <= USABLE_SHARE["cuda"] * gpu]
            for key, gigabytes in needed.items()
        },
    }
    out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "lora", Path(sys.argv[3]))
