"""What a rollout engine is, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo.budget import Limit
from grpo.models.load import LanguageModel
from grpo.models.rows import pad_right
from grpo.types import Prompt, Rollout, Sampling


class Engine(Protocol):
    """Samples completions from the policy with the weights it has at that moment."""

    def generate(
        self, prompts: Sequence[Prompt], num_generation: int, sampling: Sampling, seed: int
    ) -> Rollout:
        """`num_generation` completions for each prompt, on-policy.

        Args:
            seed: the same seed, weights and arguments give the same completions.
        """


class StopStrings:
    """Tells whether a completion that is being written has just completed a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        # A token is a byte at least; a few more, for what a decoder leaves out where a text begins.
        self.longest = max((len(text.encode()) for text in stop), default=0) + 4

    def reached(self, tokens_NC: Tensor) -> Tensor:
        """[N] bool, from the tokens written so far."""
        if not self.stop:
            return torch.zeros(len(tokens_NC), dtype=torch.bool, device=tokens_NC.device)
        tails = self.tokenizer.batch_decode(
            tokens_NC[:, -self.longest :].tolist(), skip_special_tokens=False
        )
        found = [any(text in tail for text in self.stop) for tail in tails]
        return torch.tensor(found, device=tokens_NC.device)


@dataclass(frozen=True)
class Row:
    """One completion, as long as it is."""

    tokens: Tensor  # [length] int64
    logprobs: Tensor  # [length] float32
    ended: bool


def in_shares(
    policy: LanguageModel,
    prompts: Sequence[Prompt],
    num_generation: int,
    max_new_tokens: int,
    limit: Limit,
    sample: Callable[[Sequence[int]], list[Row]],
) -> Rollout:
    """A rollout made of as many prompts at once as the limit holds, put back in order.

    Args:
        limit: of positions, prompts' tokens and the most that their completions may have.
        sample: indices of prompts to the rows of all their completions.
    """
    rows: dict[int, Row] = {}
    # In length order, so that what is sampled together is of about the same length.
    left = sorted(range(len(prompts)), key=lambda b: len(prompts[b].token_ids))

    def share() -> int:
        count = fitting([prompts[b] for b in left], num_generation, max_new_tokens, limit)
        sampled = iter(sample(left[:count]))
        for b in left[:count]:
            for g in range(num_generation):
                rows[b * num_generation + g] = next(sampled)
        return count

    while left:
        left = left[limit.fitting(share) :]
    return assemble(policy, prompts, [rows[n] for n in range(len(rows))])


def fitting(
    prompts: Sequence[Prompt], num_generation: int, max_new_tokens: int, limit: Limit
) -> int:
    """How many of the first prompts, given in length order, are sampled together; at least one."""
    count = positions = 0
    for prompt in prompts:
        more = (count + 1) * (len(prompt.token_ids) + num_generation * max_new_tokens)
        if count and more > limit.most:
            break
        count, positions = count + 1, more
    limit.starts(positions)
    return count


def assemble(policy: LanguageModel, prompts: Sequence[Prompt], rows: Sequence[Row]) -> Rollout:
    """Rows b*G+g as one padded rollout, with their texts."""
    tokens_NC, lengths_N = pad_right([row.tokens for row in rows], policy.pad_id)
    logprobs_NC, _ = pad_right([row.logprobs for row in rows], 0.0)
    texts = policy.decoder.texts([row.tokens.tolist() for row in rows])
    return Rollout(
        prompts=tuple(prompts),
        tokens_NC=tokens_NC,
        logprobs_NC=logprobs_NC,
        lengths_N=lengths_N,
        truncated_N=torch.tensor([not row.ended for row in rows], device=tokens_NC.device),
        texts=tuple(texts),
    )
