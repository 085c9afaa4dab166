"""Checks that all ranks start from the same."""

from __future__ import annotations

from collections.abc import Mapping

from grpo.errors import ConfigError
from grpo.parallel.ranks import Ranks


def check_same(ranks: Ranks, facts: Mapping[str, str]) -> None:
    """Refuses ranks whose facts differ.

    Args:
        facts: the config key that a user would look at -> what has to be the same everywhere.

    Raises:
        ConfigError: names the key and a rank that differs from the first.
    """
    first, *others = ranks.gather(lambda: dict(facts))
    for rank, found in enumerate(others, 1):
        for key, value in first.items():
            if found[key] != value:
                raise ConfigError(
                    f"{key}: rank {rank} has another {key} than rank 0; they need the same files, "
                    f"on a file system that they share or copied to each machine.",
                    key=key,
                )
