"""What is measured: the same work for both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SYSTEM_PROMPT = (
    "Solve the problem step by step. Put only the final number between <answer> and </answer>."
)


@dataclass(frozen=True)
class Setting:
    """One step's work. Every completion is written to its full length, by both."""

    prompts: int  # a step
    group: int  # completions a prompt
    tokens: int  # of each completion
    kl_weight: float
    worked_examples: int = 0  # GSM8K problems with solutions, shown in each prompt
    peer_rows: int = 0  # completions in one of the peer's micro-batches; 0: all of a step's
    steps: int = 3  # measured, after one to warm up
    model: str = "smollm2"  # or qwen2: Qwen2-0.5B's architecture with random weights
    device: str = "cpu"
    precision: str = "fp32"
    temperature: float = 1.0
    learning_rate: float = 1e-5


# peer_rows is what was fastest of those that fit into 24 GB: see docs/performance.md.
SETTINGS = {
    "note": Setting(prompts=4, group=4, tokens=50, kl_weight=0.1),
    "long": Setting(prompts=4, group=8, tokens=128, kl_weight=0.1),
    "worked": Setting(
        prompts=8, group=8, tokens=64, kl_weight=0.0, worked_examples=3, peer_rows=8, steps=2
    ),
    "tiny": Setting(prompts=4, group=4, tokens=16, kl_weight=0.1, steps=2, model="tiny"),
    "gpu": Setting(
        prompts=64, group=8, tokens=256, kl_weight=0.1, peer_rows=16, steps=3, model="qwen2",
        device="cuda", precision="bf16",
    ),
}  # fmt: skip
ON_CPU, ON_GPU = ("note", "long", "worked"), ("gpu",)

# Models with random weights, of which the memory is measured.
SHAPES: dict[str, dict[str, Any]] = {
    "135M": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "230M": {
        "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816,
        "num_hidden_layers": 13, "num_attention_heads": 16, "num_key_value_heads": 16,
        "tie_word_embeddings": False,
    },
    "494M": {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}  # fmt: skip

# Qwen2.5's: layers, hidden size, width of the block, heads, heads of keys, tied embeddings.
QWEN = {
    "0.5B": (24, 896, 4864, 14, 2, True),
    "1.5B": (28, 1536, 8960, 12, 2, True),
    "3B": (36, 2048, 11008, 16, 2, True),
    "7B": (28, 3584, 18944, 28, 4, False),
    "14B": (48, 5120, 13824, 40, 8, False),
    "32B": (64, 5120, 27648, 40, 8, False),
}
