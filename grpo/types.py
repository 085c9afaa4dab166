"""The data types that the stages of a training step pass to each other.

Shape letters, here and in all modules: B prompts a step, G completions a prompt (the group),
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
    """Returns the text without surrounding white space, or None if nothing is left."""
    return text.strip() or None


@dataclass(frozen=True)
class Example:
    """One row of a data set: a question, its gold answer, and how an answer to it is verified."""

    question: str
    answer: str
    # A completion's text -> score in [0, 1], 1 is right; a Failure where it could not be verified.
    verify: Callable[[str], float | Failure]
    columns: Mapping[str, Any] = field(default_factory=dict)  # all other columns of the row
    source: str = ""  # the name of its data set within a mix
    messages: tuple[Mapping[str, str], ...] = ()  # the question, if it already is a chat
    # Gets the answer out of a completion's text, for majority votes.
    extract_answer: Callable[[str], str | None] = strip_or_none
    # Like verify, but finds the answer anywhere.
    lenient: Callable[[str], float | Failure] | None = None


@dataclass(frozen=True)
class Prompt:
    """An example, rendered and tokenized for the model."""

    text: str
    token_ids: tuple[int, ...]
    example: Example


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Steps apply in the order of the fields; defaults do nothing."""

    temperature: float  # divides the logits; 0 is greedy, with log-probabilities at temperature 1
    # Divides the positive logits of tokens seen before, and multiplies the negative ones (CTRL).
    repetition_penalty: float = 1.0
    top_k: int = 0  # keeps the k likeliest tokens; 0 keeps all
    top_p: float = 1.0  # keeps the likeliest tokens that together have this probability
    min_p: float = 0.0  # keeps tokens at least this likely, relative to the likeliest
    stop: tuple[str, ...] = ()  # a completion ends with the token that completes one of these

    @property
    def alters_distribution(self) -> bool:
        """Whether the distribution differs from softmax(logits / temperature)."""
        return (self.repetition_penalty, self.top_k, self.top_p, self.min_p) != (1.0, 0, 1.0, 0.0)

    @property
    def truncates(self) -> bool:
        """Whether some tokens can't be drawn."""
        return (self.top_k, self.top_p, self.min_p) != (0, 1.0, 0.0)

    def as_greedy(self) -> Sampling:
        """Returns the same settings at temperature 0."""
        return replace(self, temperature=0.0)


@dataclass(frozen=True)
class Rollout:
    """G sampled completions for each of B prompts, right-padded; row b*G+g answers prompt b."""

    prompts: tuple[Prompt, ...]  # B
    tokens_NC: Tensor  # int64; padding after a row's length
    # float32, the sampler's, under the distribution that it sampled from; 0 after a row's length.
    logprobs_NC: Tensor
    lengths_N: Tensor  # int64, with the end-of-sequence token
    truncated_N: Tensor  # bool: stopped by max_new_tokens, not by an end-of-sequence token
    texts: tuple[str, ...]  # N, without end tokens and padding
    # True: the sampler's log-probabilities equal the policy's up to fp32 rounding. False: they only
    # approximate them, because the sampler computes in bf16 or is another engine.
    exact_logprobs: bool = True

    @property
    def num_generation(self) -> int:
        """G, the number of completions a prompt."""
        return len(self.texts) // len(self.prompts)

    @property
    def mask_NC(self) -> Tensor:
        """[N, C] bool: true on a row's tokens, its end-of-sequence token too; false on padding."""
        import torch

        positions_C = torch.arange(self.tokens_NC.shape[1], device=self.lengths_N.device)
        return positions_C < self.lengths_N[:, None]


@dataclass(frozen=True)
class Sample:
    """One completion, as rewards receive it."""

    prompt: str
    completion: str
    token_ids: tuple[int, ...]
    truncated: bool
    example: Example
    group: int  # completions of one prompt share it

    @property
    def answer(self) -> str:
        """The gold answer of the example."""
        return self.example.answer

    @cached_property
    def verdict(self) -> float | Failure:
        """The score of the data set's verifier, in [0, 1]; 1 is right. Computed once."""
        return self.example.verify(self.completion)


@dataclass(frozen=True)
class Failure:
    """A reward's return value when it can't be computed, for no fault of the completion.

    The completion then has no total, whatever its other rewards are: it is left out of baseline
    and scale, and is not trained on. Failures are counted and logged. A reward that returns None
    instead of a number doesn't apply; the total is then the sum of the others.
    """

    reason: str


@dataclass(frozen=True)
class Scores:
    """The rewards of a rollout, each by itself and their sum.

    NaN in a part: the reward doesn't apply to this completion, or failed. NaN in the total: no
    reward applies, or one failed.
    """

    parts: Mapping[str, Tensor]  # name -> [N] float32, before its weight
    weights: Mapping[str, float]
    total_BG: Tensor  # float32: the weighted sum of the parts
    right_BG: Tensor  # bool: the data set's verifier says that the completion is right
    failures: Mapping[str, Mapping[int, str]]  # name -> row -> why it couldn't be computed
    sources: tuple[str, ...]  # B, the data set of each prompt within a mix

    def stack_parts(self) -> tuple[Tensor, Tensor]:
        """Returns the parts as [R, B, G] and their weights [R].

        All parts of a completion without a total are NaN, so that those which are known are not
        compared with the same reward of other completions.
        """
        import torch

        parts = [part_N.view(self.total_BG.shape) for part_N in self.parts.values()]
        parts_RBG = torch.stack(parts).masked_fill(self.total_BG.isnan(), torch.nan)
        return parts_RBG, torch.tensor(list(self.weights.values()))
