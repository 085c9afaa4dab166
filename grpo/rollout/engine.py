"""What a rollout engine is, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo.errors import RunError
from grpo.memory.budget import TokenLimit
from grpo.models.load import LanguageModel
from grpo.models.padding import pad_right
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

    def find_stopped(self, tokens_NC: Tensor) -> Tensor:
        """[N] bool, from the tokens written so far."""
        if not self.stop:
            return torch.zeros(len(tokens_NC), dtype=torch.bool, device=tokens_NC.device)
        tails = self.tokenizer.batch_decode(
            tokens_NC[:, -self.longest :].tolist(), skip_special_tokens=False
        )
        found = [any(text in tail for text in self.stop) for tail in tails]
        return torch.tensor(found, device=tokens_NC.device)


class InvalidLogits(RunError):
    """The policy's logits are NaN or infinite, so there is nothing to sample from."""

    def __init__(self, prompt: Prompt, num_written: int) -> None:
        super().__init__(
            f"the policy's logits are NaN or infinite after {num_written} tokens of a completion. "
            f"Most likely its weights have grown too large (see optim/grad_norm, kl/mean): go on "
            f"from an earlier checkpoint with a smaller learning_rate or optim.max_grad_norm, or "
            f"with device.precision=fp32.\n  prompt: {prompt.text!r}"
        )


@dataclass(frozen=True)
class SampledCompletion:
    """One completion, as long as it is."""

    tokens: Tensor  # [length] int64
    logprobs: Tensor  # [length] float32
    ended: bool


class GroupPart(NamedTuple):
    """Some of the completions of one prompt."""

    prompt: int  # index into B
    rows: range  # of its group


def sample_in_batches(
    policy: LanguageModel,
    prompts: Sequence[Prompt],
    num_generation: int,
    max_new_tokens: int,
    limit: TokenLimit,
    sample: Callable[[Sequence[int], range], list[SampledCompletion]],
    same_length_only: bool = False,
) -> Rollout:
    """A rollout made of as many completions at once as the limit holds, put back in order.

    Args:
        limit: of positions, prompts' tokens and the most that their completions may have.
        sample: indices of prompts, and which rows of their groups, to those completions.
        unpadded: only prompts of one length are sampled together.
    """
    done: dict[int, SampledCompletion] = {}
    lengths = [len(prompt.token_ids) for prompt in prompts]
    # In length order, so that what is sampled together is of about the same length.
    order = sorted(range(len(prompts)), key=lambda b: lengths[b])
    left = [GroupPart(b, range(num_generation)) for b in order]

    def sample_share() -> list[GroupPart]:
        share, rest = choose_next_batch(left, lengths, max_new_tokens, limit, same_length_only)
        sampled = iter(sample([part.prompt for part in share], share[0].rows))
        for part in share:
            for g in part.rows:
                done[part.prompt * num_generation + g] = next(sampled)
        return rest

    while left:
        left = limit.retry_smaller(sample_share)
    exact = policy.device.autocast_dtype is None
    return assemble_rollout(policy, prompts, [done[n] for n in range(len(done))], exact)


def choose_next_batch(
    remaining: Sequence[GroupPart],
    lengths: Sequence[int],
    max_new_tokens: int,
    limit: TokenLimit,
    same_length_only: bool,
) -> tuple[list[GroupPart], list[GroupPart]]:
    """What is sampled together next, and what is left after that.

    As many whole groups as the limit holds, or evenly divided parts of one that is over it, a row
    at the least.

    Args:
        left: in the order of their prompts' lengths; only the first may be part of a group.
        lengths: of all prompts.
    """
    first = remaining[0]
    size, room = len(first.rows), limit.max_at_once - lengths[first.prompt]
    most = max(1, room // max_new_tokens)
    if size > most:
        size = -(-size // -(-size // most))
        limit.record_start(lengths[first.prompt] + size * max_new_tokens)
        rest = GroupPart(first.prompt, first.rows[size:])
        return [first._replace(rows=first.rows[:size])], [rest, *remaining[1:]]
    count = positions = 0
    for part in remaining:
        more = (count + 1) * (lengths[part.prompt] + size * max_new_tokens)
        other = same_length_only and lengths[part.prompt] != lengths[first.prompt]
        if count and (more > limit.max_at_once or part.rows != first.rows or other):
            break
        count, positions = count + 1, more
    limit.record_start(positions)
    return list(remaining[:count]), list(remaining[count:])


def assemble_rollout(
    policy: LanguageModel,
    prompts: Sequence[Prompt],
    rows: Sequence[SampledCompletion],
    exact_logprobs: bool,
) -> Rollout:
    """Rows b*G+g as one padded rollout, with their texts; exact: as `Rollout` says."""
    tokens_NC, lengths_N = pad_right([row.tokens for row in rows], policy.pad_id)
    logprobs_NC, _ = pad_right([row.logprobs for row in rows], 0.0)
    texts = policy.decoder.decode_batch([row.tokens.tolist() for row in rows])
    return Rollout(
        prompts=tuple(prompts),
        tokens_NC=tokens_NC,
        logprobs_NC=logprobs_NC,
        lengths_N=lengths_N,
        truncated_N=torch.tensor([not row.ended for row in rows], device=tokens_NC.device),
        texts=tuple(texts),
        exact_logprobs=exact_logprobs,
    )
