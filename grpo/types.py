"""What passes between the stages.

Shape letters, here and everywhere: B prompts a step, G completions a prompt (the group),
N = B*G completions in order b*G+g, P prompt tokens, C completion tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One row of a data set: a question, its gold answer, and how an answer to it is verified."""

    question: str
    answer: str
    verify: Callable[[str], float]  # a completion's text -> score in [0, 1], 1 is right
    columns: Mapping[str, Any] = field(default_factory=dict)  # everything else the row holds


@dataclass(frozen=True)
class Prompt:
    """An example as the model reads it."""

    text: str
    token_ids: tuple[int, ...]
    example: Example


@dataclass(frozen=True)
class Rollout:
    """G sampled completions for each of B prompts, right-padded; row b*G+g answers prompt b."""

    prompts: tuple[Prompt, ...]  # B
    tokens_NC: Tensor  # int64; what stands past a row's length is padding
    logprobs_NC: Tensor  # float32, under the distribution sampled from; 0 past a row's length
    lengths_N: Tensor  # int64, the end-of-sequence token counted
    truncated_N: Tensor  # bool: stopped by max_new_tokens, not by an end-of-sequence token
    texts: tuple[str, ...]  # N, special tokens left out

    @property
    def num_generation(self) -> int:
        return len(self.texts) // len(self.prompts)

    def metrics(self) -> dict[str, float]:
        lengths_N = self.lengths_N.float()
        return {
            "completion/length_mean": float(lengths_N.mean()),
            "completion/length_max": float(lengths_N.max()),
            "completion/truncated": float(self.truncated_N.float().mean()),
        }

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


@dataclass(frozen=True)
class Scores:
    """The rewards of a rollout, part by part and in sum."""

    parts: Mapping[str, Tensor]  # name -> [N] float32, before its weight
    total_BG: Tensor  # float32: the weighted sum of the parts
    right_BG: Tensor  # bool: what the data set's own verifier says

    def metrics(self) -> dict[str, float]:
        right_B = self.right_BG.float().mean(dim=1)
        agree_B = (self.total_BG == self.total_BG[:, :1]).all(dim=1)
        return {
            "reward/mean": float(self.total_BG.mean()),
            "reward/std": float(self.total_BG.std()),  # over all completions of the step
            **{f"reward/{name}": float(part_N.mean()) for name, part_N in self.parts.items()},
            "reward/solved_groups": float((right_B == 1).float().mean()),
            "reward/unsolved_groups": float((right_B == 0).float().mean()),
            "reward/zero_variance_groups": float(agree_B.float().mean()),
        }
