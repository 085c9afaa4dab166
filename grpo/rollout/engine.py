"""What a rollout engine is, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo.models.load import LanguageModel
from grpo.models.pad import pad_right
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
    token_budget: int,
    sample: Callable[[Sequence[int]], list[Row]],
) -> Rollout:
    """A rollout made of as many prompts at once as the budget holds, put back in order.

    sample: indices of prompts to the rows of all their completions.
    """
    rows: dict[int, Row] = {}
    for share in shares(prompts, num_generation, max_new_tokens, token_budget):
        sampled = iter(sample(share))
        for b in share:
            for g in range(num_generation):
                rows[b * num_generation + g] = next(sampled)
    return assemble(policy, prompts, [rows[n] for n in range(len(rows))])


def shares(
    prompts: Sequence[Prompt], num_generation: int, max_new_tokens: int, token_budget: int
) -> Iterator[list[int]]:
    """Prompts in length order, at least one at a time.

    token_budget: tokens of prompts, and the most that their completions may have.
    """
    share: list[int] = []
    for b in sorted(range(len(prompts)), key=lambda b: len(prompts[b].token_ids)):
        width = len(prompts[b].token_ids) + num_generation * max_new_tokens
        if share and (len(share) + 1) * width > token_budget:
            yield share
            share = []
        share.append(b)
    yield share


def assemble(policy: LanguageModel, prompts: Sequence[Prompt], rows: Sequence[Row]) -> Rollout:
    """Rows b*G+g as one padded rollout, with their texts."""
    tokens_NC, lengths_N = pad_right([row.tokens for row in rows], policy.pad_id)
    logprobs_NC, _ = pad_right([row.logprobs for row in rows], 0.0)
    texts = policy.tokenizer.batch_decode(
        [row.tokens.tolist() for row in rows], skip_special_tokens=True
    )
    return Rollout(
        prompts=tuple(prompts),
        tokens_NC=tokens_NC,
        logprobs_NC=logprobs_NC,
        lengths_N=lengths_N,
        truncated_N=torch.tensor([not row.ended for row in rows], device=tokens_NC.device),
        texts=tuple(texts),
    )
