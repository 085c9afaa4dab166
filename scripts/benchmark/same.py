"""Whether both sides compute the same: this project's loss and gradient on the peer's first batch.

same.py WORK SETTING PRECISION PEER OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from settings import SETTINGS

from grpo.device import open_device
from grpo.memory.budget import Budget
from grpo.memory.microbatch import score_rollout
from grpo.models.load import load_language_model
from grpo.models.reference import make_reference
from grpo.objective.kl import k3
from grpo.objective.losses import clipped_surrogate
from grpo.objective.ratios import token_ratio
from grpo.objective.weights import sequence_mean
from grpo.training.loss import KLTerm, Objective, UpdateInputs
from grpo.training.optimizer import SCHEDULES, Optimizer
from grpo.training.update import update_policy
from grpo.types import Example, Prompt, Rollout, Sampling

LIMIT = Budget.from_tokens(2048).forward_limit


def main(work: Path, name: str, precision: str, peer: Path, out: Path) -> None:
    setting = SETTINGS[name]
    batches = torch.load(peer.with_suffix(".pt"))
    device = open_device(setting.device, precision)
    policy = load_language_model(work / "model", device)
    reference = make_reference(policy, moves=False)
    rows = [
        (ids[mask.bool()].tolist(), completion, advantage)
        for batch in batches
        for ids, mask, completion, advantage in zip(
            *(batch[n] for n in ("prompt_ids", "prompt_mask", "completion_ids", "advantages")),
            strict=True,
        )
    ]
    rows.sort(key=lambda row: row[0])  # micro-batches may come in any order
    example = Example("", "", float)
    tokens_NC = torch.stack([row[1] for row in rows]).to(device.torch_device)
    count, width = tokens_NC.shape
    rollout = Rollout(
        prompts=tuple(Prompt("", tuple(row[0]), example) for row in rows[:: setting.group]),
        tokens_NC=tokens_NC,
        logprobs_NC=torch.zeros(count, width, device=device.torch_device),
        lengths_N=torch.full((count,), width, device=device.torch_device),
        truncated_N=torch.ones(count, dtype=torch.bool, device=device.torch_device),
        texts=("",) * count,
    )
    sampling = Sampling(setting.temperature)
    term = KLTerm(k3, None, in_reward=False, unbiased_gradient=False)
    kl = term if setting.kl_weight else None
    objective = Objective(token_ratio, clipped_surrogate, sequence_mean, kl, sampling, width)
    # The peer counts its own log-probabilities as old: the ratio is 1.
    scored = score_rollout(policy, rollout, objective.readout, LIMIT)
    rollout.logprobs_NC.copy_(scored.logprobs)
    optimizer = Optimizer(
        policy.model, "adamw", 0.0, 1, SCHEDULES["constant"], 0, 0.0, (0.9, 0.999), 1.0
    )
    advantages_N = torch.stack([row[2] for row in rows]).to(device.torch_device)
    learned = UpdateInputs(
        advantages_N, None, scored.plain_logprobs if kl else None, setting.kl_weight
    )
    stats = update_policy(policy, reference, optimizer, objective, rollout, learned, LIMIT).metrics
    out.write_text(json.dumps({"loss": stats["loss/total"], "grad_norm": stats["optim/grad_norm"]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5]))
