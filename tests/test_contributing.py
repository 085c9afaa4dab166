"""What CONTRIBUTING.md shows is added to a copy of the project and run there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import read_lines

ROOT = Path(__file__).parents[1]
PARTS = {
    section.partition("\n")[0]: re.findall(r"```(python|yaml|bash)\n(.*?)```", section, re.DOTALL)
    for section in re.split(r"^### ", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)[
        1:
    ]
}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_new_part_is_a_file_and_its_yaml(part: str, tmp_path: Path) -> None:
    project = tmp_path / "project"
    for name in ("grpo", "conf", "hydra_plugins"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    (command,) = [text for kind, text in PARTS[part] if kind == "bash"]
    for kind, text in PARTS[part]:
        if kind != "bash":
            file = project / text.partition("\n")[0].removeprefix("# ")
            assert not file.exists()
            file.write_text(text)
    run = [
        "experiment=smoke", "tracking=none", "max_steps=1", "dataset.eval_slice=:2",
        "eval.samples=1", "hydra.run.dir=run",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "grpo", *shlex.split(command)[1:], *run],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(project)}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (step,) = [line for line in read_lines(tmp_path / "run/metrics.jsonl") if "loss/total" in line]
    assert step["completion/length_mean"] > 0
    if part == "A reward":
        assert 0 < step["reward/digits"] < 1
    if part == "A data set":
        (row, *_) = read_lines(tmp_path / "run/completions.jsonl")
        assert int(row["answer"]) % 2 == 0


def test_every_part_is_shown() -> None:
    assert list(PARTS) == ["An algorithm", "A reward", "A data set", "An engine"]
