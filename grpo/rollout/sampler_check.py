"""Checks a sampler on a few tokens when the run is built."""

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

CHECK_TOKENS = 4  # for each completion


@torch.no_grad()
def check_sampler(make_engine: Callable[..., Engine], policy: LanguageModel) -> None:
    """Refuses a sampler whose greedy tokens are not the likeliest of the policy's forward pass.

    A sampler keeps keys and values, or a state, in a cache. A model may use a cache differently
    from what the sampler expects, which only its numbers show.

    Raises:
        ConfigError: the sampler fails, or its distribution is not the model's.
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
            f"rollout={choice}: can't sample from {name}: {format_error(error)}; {instead}.",
            key="rollout",
            value=choice,
        ) from error
    deviation = measure_deviation(policy, rollout)
    with policy.device.autocast():
        tolerance = 1e-2 if computes_in_fp32(policy.model) else 0.5
    if deviation > tolerance:
        raise ConfigError(
            f"rollout={choice}: its greedy tokens are not {name}'s likeliest (off by "
            f"{deviation:.2g} nats), because the model caches something that this sampler doesn't "
            f"support; {instead}.",
            key="rollout",
            value=choice,
        )


def measure_deviation(policy: LanguageModel, rollout: Rollout) -> float:
    """Returns the largest deviation of a greedy rollout from the policy, in nats.

    That is either a token's log-probability below the likeliest token's, or the difference between
    the sampler's and the policy's log-probability of a token.
    """
    rows = torch.arange(len(rollout.texts))
    batch = select_completions(
        rollout, MicroBatch(list(range(len(rollout.prompts))), rows, 0), policy
    )
    features = policy.compute_features(batch)
    with policy.device.autocast():
        logprobs_TV = features.to_logits(features.values_TX).float().log_softmax(dim=-1)
    policy_T = logprobs_TV.gather(1, batch.tokens_NC[batch.mask_NC][:, None])[:, 0]
    below_best_T = logprobs_TV.amax(dim=-1) - policy_T
    sampled_T = rollout.logprobs_NC[rollout.mask_NC]
    return float(torch.maximum(below_best_T, (sampled_T - policy_T).abs()).max())
