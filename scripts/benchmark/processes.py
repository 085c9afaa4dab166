"""Each measurement in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}  # nothing is asked of a network meanwhile


def run_script(script: str, *arguments: Any, out: Path | None = None) -> dict[str, Any]:
    """Runs a script of this folder in a process of its own and reads what it leaves.

    out: where it leaves it; None for a folder that is gone afterwards.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = out or Path(folder) / "out.json"
        run_quietly([sys.executable, str(HERE / script), *map(str, arguments), str(out)])
        content: dict[str, Any] = json.loads(out.read_text())
        return content


def run_quietly(command: list[str]) -> None:
    """Runs it; what it printed is shown where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\n{command[1]} failed")
