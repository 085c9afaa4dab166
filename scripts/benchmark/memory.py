"""What an optimizer step is predicted to hold, and holds: memory.py SHAPE PRECISION OUT"""

# ruff: noqa: E402 (the allocator is settled before torch is imported)
from __future__ import annotations

import json
import sys
from pathlib import Path

from grpo.memory.allocator import LARGEST, LARGEST_IN_BF16, keep_freed_memory

keep_freed_memory()

import torch
from settings import SHAPES
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from grpo.device import forget_peak, open_device
from grpo.memory.budget import Budget
from grpo.memory.estimate import LIBRARIES_GB, Work, held_by
from grpo.memory.microbatch import score_rollout
from grpo.models.files import PACKAGED
from grpo.models.head import Head, Readout
from grpo.models.load import LanguageModel, choose_forward
from grpo.models.reference import reference_of
from grpo.objective.kl import k3
from grpo.objective.losses import clipped_surrogate
from grpo.objective.ratios import token_ratio
from grpo.objective.weights import sequence_mean
from grpo.training.loss import KLTerm, Learned, Objective
from grpo.training.optimizer import SCHEDULES, Optimizer
from grpo.training.update import update
from grpo.types import Example, Prompt, Rollout, Sampling

PROMPT, COMPLETION, GROUP = 128, 128, 8  # tokens of a group: 1152


def random_model(shape: str, precision: str) -> LanguageModel:
    qwen = shape == "494M"
    config = (Qwen2Config if qwen else LlamaConfig)(**SHAPES[shape], eos_token_id=2, pad_token_id=0)
    model = (Qwen2ForCausalLM if qwen else LlamaForCausalLM)(config).eval()
    head = Head(model)
    return LanguageModel(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(PACKAGED / "tiny"),
        head=head,
        forward=choose_forward(model, head),
        end_ids=(2,),
        context=2048,
        device=open_device("cpu", precision),
    )


def written(groups: int) -> Rollout:
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
    keep_freed_memory(LARGEST_IN_BF16 if precision == "bf16" else LARGEST)  # as a run does
    policy = random_model(shape, precision)
    work = Work(PROMPT, COMPLETION, GROUP, "adamw", reference=True, reference_moves=False)
    held, rollout = held_by(policy, work), written(2)
    tokens = GROUP * COMPLETION + PROMPT  # a group at once
    limit, sampling = Budget.of(tokens).computed, Sampling(1.0)
    term = KLTerm(k3, None, in_reward=False, unbiased_gradient=False)
    objective = Objective(token_ratio, clipped_surrogate, sequence_mean, term, sampling, COMPLETION)
    reference = reference_of(policy, moves=False)
    optimizer = Optimizer(
        policy.model, "adamw", 1e-6, 9, SCHEDULES["constant"], 0, 0.0, (0.9, 0.99), 1.0
    )
    forget_peak("cpu")
    reference_NC = score_rollout(reference.model, rollout, Readout(sampling), limit).plain
    learned = Learned(torch.randn(len(rollout.texts)), None, reference_NC, 0.1)
    for _ in range(2):
        update(policy, reference, optimizer, objective, rollout, learned, limit)
    predicted = LIBRARIES_GB["cpu"] + held.training + held.token * tokens / 1e9
    found = {
        "tokens": tokens,
        "predicted_gb": predicted,
        "measured_gb": policy.device.peak_gb(),
        "megabytes_a_token": held.token / 1e6,
    }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
