"""The user's cache folder, for files that are made once on a machine."""

from __future__ import annotations

import os
from pathlib import Path


def get_cache_folder() -> Path:
    """Returns grpo-bench in $XDG_CACHE_HOME, by default in ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "grpo-bench"
