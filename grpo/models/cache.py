"""The user's own folder for what is made once a machine."""

from __future__ import annotations

import os
from pathlib import Path


def get_cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "grpo-bench"
