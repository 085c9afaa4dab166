"""The interface of rollout engines, and the functions that they share."""

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
    """Samples completions from the policy with its current weights."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        num_generation: int,
        sampling: Sampling,
        seed: int,
        share: Sequence[int] | None = None,
    ) -> Rollout:
        """Samples `num_generation` completions for each prompt, on-policy.

        Args:
            seed: the same seed, weights and arguments give the same completions.
            share: indices of the prompts to sample; the rollout then holds these alone, in this
                order. Other ranks sample the others. Never given in a run with one process.

        Raises:
            InvalidLogits: the policy's logits are NaN or infinite.
            RunError: memory ran out with as little as can be sampled at once.
        """


class StopStrings:
    """Finds completions whose last token completes a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        # The number of last tokens to decode. A token has at least one byte; four more tokens,
        # because a decoder may drop characters at the start of a text.
        self.longest = max((len(text.encode()) for text in stop), default=0) + 4

    def find_stopped(self, tokens_NC: Tensor) -> Tensor:
        """Returns [N] bool: whether the end of each row's tokens [N, C] contains a stop string."""
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
            f"the policy's logits are NaN or infinite after {num_written} tokens of a completion "
            f"of {prompt.text!r}. Most likely its weights have grown too large (see "
            f"optim/grad_norm, kl/mean): resume from an earlier checkpoint with a smaller "
            f"learning_rate or optim.max_grad_norm, or with device.precision=fp32."
        )


@dataclass(frozen=True)
class SampledCompletion:
    """One completion without padding."""

    tokens: Tensor  # [length] int64
    logprobs: Tensor  # [length] float32
    ended: bool  # by an end token or a stop string, not by max_new_tokens


class GroupPart(NamedTuple):
    """A range of the completions of one prompt."""

    prompt: int  # index into B
    rows: range  # indices into its group


def sample_in_batches(
    policy: LanguageModel,
    prompts: Sequence[Prompt],
    num_generation: int,
    max_new_tokens: int,
    limit: TokenLimit,
    sample: Callable[[Sequence[int], range], list[SampledCompletion]],
    same_length_only: bool = False,
) -> Rollout:
    """Returns a rollout, sampled in batches that fit into the limit, with rows in order b*G+g.

    Args:
        limit: of positions: the prompts' tokens, and max_new_tokens for each completion.
        sample: samples completions, from indices of prompts and a range of rows of their groups.
        same_length_only: only prompts of one length are sampled together.

    Raises:
        RunError: memory ran out with as little as can be sampled at once.
    """
    done: dict[int, SampledCompletion] = {}
    lengths = [len(prompt.token_ids) for prompt in prompts]
    # In the order of length, so that prompts of similar length are sampled together.
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
    """Returns the parts that are sampled together next, and those that remain after them.

    The next batch is as many whole groups as the limit holds. A group that exceeds the limit is
    divided evenly, into batches of at least one row.

    Args:
        remaining: in the order of their prompts' lengths; only the first may be part of a group.
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
    """Pads the completions, in order b*G+g, to one rollout, and decodes their texts.

    Args:
        exact_logprobs: see `Rollout`.
    """
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
