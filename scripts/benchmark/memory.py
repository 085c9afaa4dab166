"""What an optimizer step is predicted to hold, and holds: memory.py SHAPE PRECISION OUT"""

# ruff: noqa: E402 (the allocator is settled before torch is imported)
from __future__ import annotations

import json
import sys
from pathlib import Path

from grpo.memory.allocator import LARGEST_KEPT_BLOCK, LARGEST_KEPT_BLOCK_IN_BF16, keep_freed_memory

keep_freed_memory()

import torch
from settings import SHAPES
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from grpo.device import open_device, reset_peak_memory
from grpo.memory.budget import Budget
from grpo.memory.estimate import LIBRARIES_GB, Workload, estimate_memory
from grpo.memory.microbatch import score_rollout
from grpo.models.files import PACKAGE_FOLDER
from grpo.models.head import Head, Readout
from grpo.models.load import LanguageModel, choose_forward
from grpo.models.reference import make_reference
from grpo.objective.kl import k3
from grpo.objective.losses import clipped_surrogate
from grpo.objective.ratios import token_ratio
from grpo.objective.weights import sequence_mean
from grpo.training.loss import KLTerm, Objective, UpdateInputs
from grpo.training.optimizer import SCHEDULES, Optimizer
from grpo.training.update import update_policy
from grpo.types import Example, Prompt, Rollout, Sampling

PROMPT, COMPLETION, GROUP = 128, 128, 8  # tokens of a group: 1152


def build_random_model(shape: str, precision: str) -> LanguageModel:
    qwen = shape == "494M"
    config = (Qwen2Config if qwen else LlamaConfig)(**SHAPES[shape], eos_token_id=2, pad_token_id=0)
    model = (Qwen2ForCausalLM if qwen else LlamaForCausalLM)(config).eval()
    head = Head(model)
    return LanguageModel(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(PACKAGE_FOLDER / "tiny"),
        head=head,
        forward=choose_forward(model, head),
        end_ids=(2,),
        context_length=2048,
        device=open_device("cpu", precision),
    )


def build_rollout(groups: int) -> Rollout:
    """Completions that nobody wrote."""
    count, example = groups * GROUP, Example("", "", float)
    return Rollout(
        prompts=(Prompt("", (5,) * PROMPT, example),) * groups,
        tokens_NC=torch.full((count, COMPLETION), 7),
        logprobs_NC=torch.full((count, COMPLETION), -1.0),
        lengths_N=torch.full((count,), COMPLETION),
        truncated_N=torch.zeros(count, dtype=torch.bool),
        texts=("",) * count,
    )


def main(shape: str, precision: str, out: Path) -> None:
    torch.manual_seed(0)
    # As a run does.
    keep_freed_memory(LARGEST_KEPT_BLOCK_IN_BF16 if precision == "bf16" else LARGEST_KEPT_BLOCK)
    policy = build_random_model(shape, precision)
    work = Workload(PROMPT, COMPLETION, GROUP, "adamw", reference=True, reference_moves=False)
    held, rollout = estimate_memory(policy, work), build_rollout(2)
    tokens = GROUP * COMPLETION + PROMPT  # a group at once
    limit, sampling = Budget.from_tokens(tokens).forward_limit, Sampling(1.0)
    term = KLTerm(k3, None, in_reward=False, unbiased_gradient=False)
    objective = Objective(token_ratio, clipped_surrogate, sequence_mean, term, sampling, COMPLETION)
    reference = make_reference(policy, moves=False)
    optimizer = Optimizer(
        policy.model, "adamw", 1e-6, 9, SCHEDULES["constant"], 0, 0.0, (0.9, 0.99), 1.0
    )
    reset_peak_memory("cpu")
    reference_NC = score_rollout(reference.model, rollout, Readout(sampling), limit).plain_logprobs
    learned = UpdateInputs(torch.randn(len(rollout.texts)), None, reference_NC, 0.1)
    for _ in range(2):
        update_policy(policy, reference, optimizer, objective, rollout, learned, limit)
    predicted = LIBRARIES_GB["cpu"] + held.training_gb + held.token_bytes * tokens / 1e9
    figures = {
        "tokens": tokens,
        "predicted_gb": predicted,
        "measured_gb": policy.device.measure_peak_gb(),
        "megabytes_a_token": held.token_bytes / 1e6,
    }
    out.write_text(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
