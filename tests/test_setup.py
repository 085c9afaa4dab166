"""The two commands of the README on a copy of the project with nothing installed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}


def copy_tracked(target: Path) -> Path:
    """What git tracks, and nothing that was built or installed here."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    return target


@pytest.mark.slow
def test_an_interrupted_set_up_is_completed_from_any_directory(tmp_path: Path) -> None:
    project, elsewhere = copy_tracked(tmp_path / "a project"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [project / "scripts/train", "--cfg", "job"]
    first = subprocess.Popen(
        command, cwd=elsewhere, env=ENVIRONMENT, start_new_session=True, stderr=subprocess.PIPE
    )
    for _ in range(1200):  # until packages are being installed
        if list(project.glob(".venv/lib/*/site-packages/torch")):
            break
        assert first.poll() is None
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (project / ".venv/.complete").exists()

    second = subprocess.run(
        command, cwd=elsewhere, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200
    )
    assert second.returncode == 0, second.stderr
    assert "Setting up" in second.stderr
    assert "num_generation: 8" in second.stdout

    third = subprocess.run(
        [project / "scripts/train", "experiment=smoke", "tracking=none"],
        cwd=elsewhere,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert third.returncode == 0, third.stderr
    assert "Setting up" not in third.stderr
    assert list(elsewhere.glob("outputs/*/*/summary.json"))
