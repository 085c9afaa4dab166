"""Checks that all ranks start from the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from grpo.errors import ConfigError
from grpo.parallel.ranks import Ranks


def check_same(ranks: Ranks, collect_facts: Callable[[], Mapping[str, str]]) -> None:
    """Refuses ranks whose facts differ.

    Args:
        collect_facts: returns what has to be the same everywhere, by the config key to look at.

    Raises:
        ConfigError: names the key and a rank that differs from the first.
    """
    if ranks.size == 1:
        return
    first, *others = ranks.gather(collect_facts)
    for rank, found in enumerate(others, 1):
        for key, value in first.items():
            if found[key] != value:
                raise ConfigError(
                    f"{key}: rank {rank} has another {key} than rank 0; they need the same files, "
                    f"on a file system that they share or copied to each machine.",
                    key=key,
                )
