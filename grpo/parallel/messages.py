"""Packs what ranks send each other. A tensor arrives on the device of the rank that receives it."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor


def pack(value: object) -> bytes:
    """Pickles a value; tensors on a GPU are copied to the CPU and remember where they were."""
    buffer = io.BytesIO()
    Packer(buffer, protocol=5).dump(value)
    return buffer.getvalue()


def unpack(message: bytes, device: torch.device) -> Any:
    """Restores a value, with tensors that were on a GPU on this device."""
    return Unpacker(io.BytesIO(message), device).load()


class Packer(pickle.Pickler):
    def persistent_id(self, value: object) -> tuple[bool, str, tuple[int, ...], bytes] | None:
        if not isinstance(value, Tensor):
            return None
        plain = value.detach().cpu().contiguous()
        dtype = str(plain.dtype).removeprefix("torch.")
        content = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
        return value.device.type != "cpu", dtype, tuple(plain.shape), content


class Unpacker(pickle.Unpickler):
    def __init__(self, buffer: io.BytesIO, device: torch.device) -> None:
        super().__init__(buffer)
        self.device = device

    def persistent_load(self, saved: tuple[bool, str, tuple[int, ...], bytes]) -> Tensor:
        on_device, dtype, shape, content = saved
        kind = getattr(torch, dtype)
        if not content:
            tensor = torch.empty(shape, dtype=kind)
        else:
            tensor = torch.frombuffer(bytearray(content), dtype=kind).view(shape)
        return tensor.to(self.device) if on_device else tensor
