"""A sampler tried on a few tokens, before anything depends on it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from grpo.errors import ConfigError, format_error
from grpo.memory.budget import Budget
from grpo.memory.microbatch import MicroBatch, select_completions
from grpo.models.forward import (
    FORWARD_ERRORS,
    computes_in_fp32,
    forward_shared_prompt,
    make_random_completions,
)
from grpo.models.load import LanguageModel
from grpo.rollout.engine import Engine
from grpo.types import Example, Prompt, Rollout, Sampling

CHECK_TOKENS = 4  # tokens a completion


@torch.no_grad()
def check_sampler(make_engine: Callable[..., Engine], policy: LanguageModel) -> None:
    """Refuses a sampler whose tokens are not those that the policy thinks likeliest.

    Both samplers keep what was read in a cache of their own, which a model may use in another way
    than they expect, and nothing but its numbers says so.

    Raises:
        ConfigError: it samples from something else than the model, or can't.
    """
    batch = make_random_completions(policy.head.vocabulary, policy.model.device)
    prompts = [
        Prompt("", tuple(row[-length:]), Example("", "", lambda _: 0.0))
        for row, length in zip(
            batch.prompts_BP.tolist(), batch.prompt_lengths_B.tolist(), strict=True
        )
    ]
    engine = make_engine(
        policy=policy, max_new_tokens=CHECK_TOKENS, budget=Budget.from_tokens(1024)
    )
    choice = "native" if type(engine).__name__ == "NativeEngine" else "hf"
    instead = "use rollout=hf"
    if choice == "hf":
        shared = policy.forward is forward_shared_prompt
        instead = "use rollout=native" if shared else "use another model"
    name = type(policy.model).__name__
    try:
        rollout = engine.generate(prompts, 1, Sampling(temperature=0.0), seed=0)
    except FORWARD_ERRORS as error:
        raise ConfigError(
            f"rollout={choice}: it can't sample from {name}: {format_error(error)}; {instead}.",
            key="rollout",
            value=choice,
        ) from error
    off = measure_deviation(policy, rollout)
    with policy.device.autocast():
        most = 1e-2 if computes_in_fp32(policy.model) else 0.5
    if off > most:
        raise ConfigError(
            f"rollout={choice}: what it samples is not what {name} thinks likeliest (off by "
            f"{off:.2g} nats): the model keeps something that this sampler doesn't know; "
            f"{instead}.",
            key="rollout",
            value=choice,
        )


def measure_deviation(policy: LanguageModel, rollout: Rollout) -> float:
    """How far greedy tokens and their log-probabilities are from the policy's own, in nats."""
    rows = torch.arange(len(rollout.texts))
    batch = select_completions(
        rollout, MicroBatch(list(range(len(rollout.prompts))), rows, 0), policy
    )
    features = policy.compute_features(batch)
    with policy.device.autocast():
        logprobs_TV = features.to_logits(features.values_TX).float().log_softmax(dim=-1)
    own_T = logprobs_TV.gather(1, batch.tokens_NC[batch.mask_NC][:, None])[:, 0]
    behind_T = logprobs_TV.amax(dim=-1) - own_T
    sampled_T = rollout.logprobs_NC[rollout.mask_NC]
    return float(torch.maximum(behind_T, (sampled_T - own_T).abs()).max())
