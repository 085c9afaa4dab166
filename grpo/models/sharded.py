"""Reads tensors that are divided among processes; in a run that divides none, whole ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Returns whether FSDP has divided the model's weights."""
    return hasattr(model, "unshard")


def is_divided(tensor: Tensor) -> bool:
    """Returns whether this process has only a part of the tensor."""
    return hasattr(tensor, "device_mesh")


def get_local_part(tensor: Any) -> Tensor:
    """Returns this process's rows of a divided tensor, whose memory they share; or the tensor."""
    part: Tensor = tensor.detach()
    return part.to_local() if is_divided(tensor) else part  # type: ignore[attr-defined]


def select_local_part(whole: Tensor, divided: Any) -> Tensor:
    """Returns those rows of a whole tensor that this process has of a divided one."""
    if not is_divided(divided):
        return whole
    start = find_first_row(divided)
    return whole[start : start + len(divided.to_local())]


def find_first_row(divided: Any) -> int:
    """Returns the index of the first row that this process has: as `torch.chunk` divides."""
    if not is_divided(divided):
        return 0
    mesh = divided.device_mesh
    rows = -(-divided.shape[0] // mesh.size())
    return int(min(mesh.get_local_rank() * rows, divided.shape[0]))


def sum_over_parts(values: Tensor, divided: Any) -> Tensor:
    """Returns the sum of the processes' values, if they are of parts of this tensor."""
    if is_divided(divided):
        torch.distributed.all_reduce(values, group=divided.device_mesh.get_group())
    return values


def gather_whole(tensor: Any) -> Tensor:
    """Returns the whole of a divided tensor, on every process; or the tensor."""
    whole: Tensor = tensor.full_tensor() if is_divided(tensor) else tensor
    return whole
