"""Pads rows of different lengths to one tensor, and selects rows with a reproducible gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def pad_left(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns token ids as int64 [B, P], padded on the left, and their lengths [B]."""
    tokens = [torch.tensor(row, dtype=torch.int64) for row in rows]
    padded_BP = pad_sequence(tokens, batch_first=True, padding_value=pad_id, padding_side="left")
    return padded_BP.to(device), torch.tensor([len(row) for row in rows], device=device)


def pad_right(rows: Sequence[Tensor], value: float) -> tuple[Tensor, Tensor]:
    """Returns 1-d tensors as [N, C], padded on the right, and their lengths [N]."""
    lengths_N = torch.tensor([len(row) for row in rows], device=rows[0].device)
    return pad_sequence(list(rows), batch_first=True, padding_value=value), lengths_N


def gather_rows(x: Tensor, index_N: Tensor) -> Tensor:
    """Returns x[index_N], with a gradient that is the same bit for bit in each run.

    The gradient of a row that is selected more than once is a sum. An embedding adds in a fixed
    order; on a CPU, indexing adds in the order in which threads finish.
    """
    return F.embedding(index_N, x.flatten(1)).view(len(index_N), *x.shape[1:])
