"""Rows of tensors: of different lengths as one, and some of them, taken more than once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def pad_left(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids as int64 [B, P], each row's end at the right edge, and their lengths [B]."""
    tokens = [torch.tensor(row, dtype=torch.int64) for row in rows]
    padded_BP = pad_sequence(tokens, batch_first=True, padding_value=pad_id, padding_side="left")
    return padded_BP.to(device), torch.tensor([len(row) for row in rows], device=device)


def pad_right(rows: Sequence[Tensor], value: float) -> tuple[Tensor, Tensor]:
    """1-d tensors as [N, C], each row's start at the left edge, and their lengths [N]."""
    lengths_N = torch.tensor([len(row) for row in rows], device=rows[0].device)
    return pad_sequence(list(rows), batch_first=True, padding_value=value), lengths_N


def gather_rows(x: Tensor, index_N: Tensor) -> Tensor:
    """x[index_N], whose gradient is bit for bit the same each time.

    Where a row is taken more than once its gradient is a sum, in an order that an embedding keeps;
    on a CPU, indexing's is that in which the threads come.
    """
    return F.embedding(index_N, x.flatten(1)).view(len(index_N), *x.shape[1:])
