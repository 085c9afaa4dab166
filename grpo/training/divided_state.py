"""Saves and loads tensors that are divided among processes, with torch's distributed checkpoints.

A checkpoint's other values stay in one file, where None takes the place of a divided tensor. Any
number of processes can load what any number has saved.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from grpo.errors import ConfigError, RunError
from grpo.models.sharded import get_local_part, is_divided, select_local_part

if TYPE_CHECKING:
    from torch.distributed.checkpoint.api import CheckpointException


def separate_divided(state: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Returns a state without its divided tensors, and these by their paths in it."""
    if isinstance(state, Tensor):
        return (None, {path: state}) if is_divided(state) else (state, {})
    if not isinstance(state, dict | list):
        return state, {}
    items = state.items() if isinstance(state, dict) else enumerate(state)
    parts = {key: separate_divided(value, f"{path}/{key}") for key, value in items}
    divided = {name: tensor for _, found in parts.values() for name, tensor in found.items()}
    rest = {key: value for key, (value, _) in parts.items()}
    return (rest if isinstance(state, dict) else list(rest.values())), divided


def save_divided(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Writes each process's part of the tensors. All processes call it together.

    Raises:
        RunError: they could not be written, on any process.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            save(dict(tensors), checkpoint_id=str(folder))
        except CheckpointException as error:  # no Exception, so nothing else would catch it
            raise RunError(f"{folder}: can't be written: {explain_failure(error)}") from error


def explain_failure(error: CheckpointException) -> str:
    """Returns what the first process that failed says."""
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {type(cause).__name__}: {cause}"


def load_divided(saved: Any, current: Any, folder: Path) -> Any:
    """Returns a saved state with all of its tensors, divided like those of the current state.

    Args:
        saved: as `separate_divided` returned it.
        current: a state of the same structure, whose divided tensors are overwritten.
        folder: of `save_divided`; it need not exist.

    Raises:
        ConfigError: it can't be read, on any process.
    """
    tensors = dict(list_tensors(current))
    if folder.is_dir():
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        stored = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = {name: tensors[name] for name in stored if name in tensors}
            try:
                load(wanted, checkpoint_id=str(folder), no_dist=not dist.is_initialized())
            except CheckpointException as error:
                raise ConfigError(f"{folder}: can't be read: {explain_failure(error)}") from error
    return fill_divided(saved, tensors)


def list_tensors(state: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields all tensors of a state with their paths in it."""
    if isinstance(state, Tensor):
        yield path, state
    elif isinstance(state, dict | list):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from list_tensors(value, f"{path}/{key}")


@torch.no_grad()
def fill_divided(saved: Any, tensors: Mapping[str, Tensor], path: str = "") -> Any:
    """Returns a saved state in which present tensors take the places of divided ones."""
    present = tensors.get(path)
    if saved is None and present is not None:
        return present
    if isinstance(saved, Tensor) and present is not None and is_divided(present):
        get_local_part(present).copy_(select_local_part(saved, present))
        return present
    if isinstance(saved, dict):
        return {key: fill_divided(value, tensors, f"{path}/{key}") for key, value in saved.items()}
    if isinstance(saved, list):
        return [fill_divided(value, tensors, f"{path}/{n}") for n, value in enumerate(saved)]
    return saved
