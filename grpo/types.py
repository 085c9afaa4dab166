"""What passes between the stages.

Shape letters, here and everywhere: B prompts a step, G completions a prompt (the group),
N = B*G completions in order b*G+g, P prompt tokens, C completion tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def strip_or_none(text: str) -> str | None:
    return text.strip() or None


@dataclass(frozen=True)
class Example:
    """One row of a data set: a question, its gold answer, and how an answer to it is verified."""

    question: str
    answer: str
    # A completion's text -> score in [0, 1], 1 is right; a Failure where it could not be verified.
    verify: Callable[[str], float | Failure]
    columns: Mapping[str, Any] = field(default_factory=dict)  # everything else the row holds
    source: str = ""  # which of the sets of a mix it is from
    messages: tuple[Mapping[str, str], ...] = ()  # the question, where it is a chat already
    extract_answer: Callable[[str], str | None] = (
        strip_or_none  # a completion's answer, for majority votes
    )
    lenient: Callable[[str], float | Failure] | None = None  # verify, wherever the answer stands


@dataclass(frozen=True)
class Prompt:
    """An example as the model reads it."""

    text: str
    token_ids: tuple[int, ...]
    example: Example


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, in the order of the fields; what is left out changes nothing."""

    temperature: float  # divides the logits; 0 is greedy, where log-probabilities are at 1
    repetition_penalty: float = 1.0  # divides a positive logit of a token seen before; CTRL's
    top_k: int = 0  # only the likeliest so many; 0: all
    top_p: float = 1.0  # only the likeliest that make up this much of the probability
    min_p: float = 0.0  # only those at least this likely, next to the likeliest
    stop: tuple[str, ...] = ()  # a completion ends with the token that completes one of these

    @property
    def alters_distribution(self) -> bool:
        """Whether the distribution differs from softmax(logits / temperature)."""
        return (self.repetition_penalty, self.top_k, self.top_p, self.min_p) != (1.0, 0, 1.0, 0.0)

    @property
    def truncates(self) -> bool:
        """Whether it leaves out tokens."""
        return (self.top_k, self.top_p, self.min_p) != (0, 1.0, 0.0)

    def as_greedy(self) -> Sampling:
        return replace(self, temperature=0.0)


@dataclass(frozen=True)
class Rollout:
    """G sampled completions for each of B prompts, right-padded; row b*G+g answers prompt b."""

    prompts: tuple[Prompt, ...]  # B
    tokens_NC: Tensor  # int64; what stands past a row's length is padding
    logprobs_NC: Tensor  # float32, the sampler's, of what it sampled from; 0 past a row's length
    lengths_N: Tensor  # int64, the end-of-sequence token counted
    truncated_N: Tensor  # bool: stopped by max_new_tokens, not by an end-of-sequence token
    texts: tuple[str, ...]  # N, without what ends them and padding
    # The sampler's log-probabilities are the policy's, but for rounding in fp32. Not so where it
    # computes in bf16, or is another engine: what it says is then near the policy's and no more.
    exact_logprobs: bool = True

    @property
    def num_generation(self) -> int:
        return len(self.texts) // len(self.prompts)

    @property
    def mask_NC(self) -> Tensor:
        """True on each row's own tokens: the end-of-sequence token is an action, padding is not."""
        import torch

        positions_C = torch.arange(self.tokens_NC.shape[1], device=self.lengths_N.device)
        return positions_C < self.lengths_N[:, None]


@dataclass(frozen=True)
class Sample:
    """One completion as a reward sees it."""

    prompt: str
    completion: str
    token_ids: tuple[int, ...]
    truncated: bool
    example: Example
    group: int  # completions of one prompt share it

    @property
    def answer(self) -> str:
        return self.example.answer

    @cached_property
    def verdict(self) -> float | Failure:
        """What the data set's own verifier says, in [0, 1]; 1 is right. Asked once."""
        return self.example.verify(self.completion)


@dataclass(frozen=True)
class Failure:
    """In place of a reward: it could not be worked out, which says nothing of the completion.

    The completion then has no total, whatever its other rewards say: it takes no part in baseline
    and scale, and is not trained on. Failures are counted and logged. None instead of a number
    means that the reward doesn't apply, and leaves the total to the others.
    """

    reason: str


@dataclass(frozen=True)
class Scores:
    """The rewards of a rollout, part by part and in sum.

    NaN in a part: the reward doesn't apply to this completion, or failed. NaN in the sum: none
    applies, or one failed.
    """

    parts: Mapping[str, Tensor]  # name -> [N] float32, before its weight
    weights: Mapping[str, float]
    total_BG: Tensor  # float32: the weighted sum of the parts
    right_BG: Tensor  # bool: what the data set's own verifier says
    failures: Mapping[str, Mapping[int, str]]  # name -> row -> why it could not be worked out
    sources: tuple[str, ...]  # B

    def stack_parts(self) -> tuple[Tensor, Tensor]:
        """The parts as [R, B, G] and their weights [R].

        A completion without a total has none of the parts either: what is known of it is not to be
        compared with the same reward of others.
        """
        import torch

        parts = [part_N.view(self.total_BG.shape) for part_N in self.parts.values()]
        parts_RBG = torch.stack(parts).masked_fill(self.total_BG.isnan(), torch.nan)
        return parts_RBG, torch.tensor(list(self.weights.values()))
