"""The layout of prompts and their completions in one row of tokens, as a tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Tree:
    """B prompts, each with the same number of completions: T tokens, all prompts first."""

    prompt_lengths: tuple[int, ...]
    lengths: tuple[int, ...]  # of the N completions; 0 if no token of it is read

    @property
    def rows_per_prompt(self) -> int:
        """The number of completions of each prompt."""
        return len(self.lengths) // len(self.prompt_lengths)

    @property
    def prompt_tokens(self) -> int:
        """The number of tokens of all prompts."""
        return sum(self.prompt_lengths)

    @property
    def longest(self) -> int:
        """The tokens of the longest prompt plus those of the longest completion."""
        return max(self.prompt_lengths) + max(self.lengths, default=0)

    @cached_property
    def prompt_slices(self) -> list[slice]:
        """The slice of T of each prompt."""
        return make_slices(self.prompt_lengths, 0)

    @cached_property
    def group_slices(self) -> list[slice]:
        """The slice of T of each prompt's completions."""
        group_lengths = [
            sum(self.lengths[b * self.rows_per_prompt : (b + 1) * self.rows_per_prompt])
            for b in range(len(self.prompt_lengths))
        ]
        return make_slices(group_lengths, self.prompt_tokens)

    @cached_property
    def completion_slices(self) -> list[slice]:
        """The slice of T of each completion."""
        return make_slices(self.lengths, self.prompt_tokens)

    def positions(self, device: torch.device) -> Tensor:
        """Returns positions [T]: a completion's continue those of its prompt."""
        positions = [torch.arange(length) for length in self.prompt_lengths]
        for n, length in enumerate(self.lengths):
            positions.append(torch.arange(length) + self.prompt_lengths[n // self.rows_per_prompt])
        return torch.cat(positions).to(device)


def make_slices(lengths: Sequence[int], start: int) -> list[slice]:
    """Returns adjacent slices of these lengths, the first of which begins at `start`."""
    slices = []
    for length in lengths:
        slices.append(slice(start, start + length))
        start += length
    return slices


def pad_parts(x_XTd: Tensor, parts: Sequence[slice]) -> Tensor:
    """Returns slices of x [X, T, d] as [parts, X, longest, d], with zeros after shorter ones."""
    first, width = parts[0], parts[0].stop - parts[0].start
    if all(part.stop - part.start == width for part in parts):
        whole = x_XTd[:, first.start : parts[-1].stop]
        return whole.view(whole.shape[0], len(parts), width, whole.shape[2]).transpose(0, 1)
    rows = [x_XTd[:, part].transpose(0, 1) for part in parts]
    return pad_sequence(rows, batch_first=True).transpose(1, 2)


def unpad_parts(x_NXCd: Tensor, parts: Sequence[slice]) -> Tensor:
    """Reverses `pad_parts`: returns the parts end to end, [X, T', d]."""
    rows = [x_NXCd[n, :, : part.stop - part.start] for n, part in enumerate(parts)]
    return torch.cat(rows, dim=1)
