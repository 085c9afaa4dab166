"""Each folder in examples/ is copied, as a user would, and its README's commands are run there."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
from pathlib import Path

import pytest

from grpo.models.files import PACKAGE_FOLDER
from tests.conftest import read_lines, run_grpo

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = (
    "tracking=none", "max_steps=1", "batch_size=2", "num_generation=2", "max_new_tokens=24",
    "dataset.eval_slice=:2", "eval.samples=1", "eval.every=0",
)  # fmt: skip


def copy_example(name: str, target: Path) -> tuple[Path, list[list[str]]]:
    """A copy, and the arguments of each command of its README."""
    folder = target / name
    shutil.copytree(
        EXAMPLES / name, folder, ignore=shutil.ignore_patterns("__pycache__", "outputs")
    )
    blocks = re.findall(r"```bash\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert all(command[0] == "grpo" for command in commands)
    return folder, [command[1:] for command in commands]


def test_every_folder_is_in_the_list() -> None:
    listed = re.findall(r"^\| \[(\w+)\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert set(listed) == {folder.name for folder in EXAMPLES.iterdir() if folder.is_dir()}


@pytest.mark.slow
def test_a_reward_of_ones_own(tmp_path: Path) -> None:
    folder, (train,) = copy_example("own_reward", tmp_path)
    done = run_grpo(*train, *SHORT, "hydra.run.dir=run", cwd=folder)
    assert done.returncode == 0, done.stderr
    (step,) = [line for line in read_lines(folder / "run/metrics.jsonl") if "loss/total" in line]
    assert step["reward/mean"] == pytest.approx(step["reward/answer"] + 0.5 * step["reward/near"])
    assert step["reward/near"] >= step["reward/answer"]


@pytest.mark.slow
def test_lora_on_a_models_folder(tmp_path: Path) -> None:
    """The packaged model stands for the hub's, and sums from a file for GSM8K."""
    folder, (_, train, export, chat) = copy_example("lora", tmp_path)
    stands_for = {
        "model.path=FOLDER": f"model.path={PACKAGE_FOLDER / 'tiny'}",
        "dataset.path=FILE": f"dataset.path={EXAMPLES / 'own_reward/questions.jsonl'}",
        "outputs/DATE/TIME": "run",
    }
    train, export, chat = (
        [stands_for.get(word, word) for word in command] for command in (train, export, chat)
    )
    for command in ([*train, *SHORT, "hydra.run.dir=run"], export, [*chat, "max_new_tokens=8"]):
        done = run_grpo(*command, cwd=folder)
        assert done.returncode == 0, done.stderr
    assert (folder / "run/checkpoints/latest/model/adapter_model.safetensors").is_file()
    assert (folder / "merged/model.safetensors").is_file()


@pytest.mark.slow
def test_a_study_and_its_report(tmp_path: Path) -> None:
    folder, (study, more, report) = copy_example("study", tmp_path)
    for command in (study, more):
        done = run_grpo(*command, *SHORT, cwd=folder, timeout=600)
        assert done.returncode == 0, done.stderr
    done = run_grpo(*report, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "baselines/report.html").is_file()
    with (folder / "baselines/results.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == 6
    assert {row["algorithm"] for row in rows} == {"grpo", "rloo"}
    assert {row["seed"] for row in rows} == {"0", "1", "2"}
