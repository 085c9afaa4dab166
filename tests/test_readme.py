"""A new user's path: what the README shows of one's own parts is run as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import run_grpo
from tests.test_end_to_end import lines

README = (Path(__file__).parents[1] / "README.md").read_text()
OWN = README.partition("## Parts of your own")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"```(python|yaml|bash)\n(.*?)```", OWN, re.DOTALL)
FILES = {
    text.partition("\n")[0].removeprefix("# "): text for kind, text in BLOCKS if kind != "bash"
}
COMMANDS = [text.strip() for kind, text in BLOCKS if kind == "bash"]
PARTS = {
    "a reward": (["my_rewards.py"], "my_rewards"),
    "a data set": (["my_data.py", "conf/dataset/capitals.yaml"], "capitals"),
    "an algorithm": (["my_algorithm.py", "conf/algorithm/policy_loss/hopeful.yaml"], "hopeful"),
}


@pytest.mark.parametrize(
    "part",
    [pytest.param(part, marks=[pytest.mark.slow] * (part != "a reward")) for part in PARTS],
)
def test_a_part_of_ones_own_takes_under_15_lines_and_works(part: str, tmp_path: Path) -> None:
    names, word = PARTS[part]
    assert sum(line.strip() != "" for name in names for line in FILES[name].splitlines()) < 15
    for name in names:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(FILES[name])
    (command,) = [command for command in COMMANDS if word in command]
    program, *arguments = shlex.split(command)
    assert program == "grpo"
    result = run_grpo(
        *arguments, "experiment=smoke", "max_steps=2", "tracking=none", "hydra.run.dir=run",
        cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    last = lines(tmp_path / "run/metrics.jsonl")[-1]
    if part == "a reward":
        assert 0 < last["reward/brief"] <= 1
        assert last["reward/mean"] == pytest.approx(
            last["reward/answer"] + 0.2 * last["reward/brief"]
        )
    if part == "a data set":
        completions = lines(tmp_path / "run/completions.jsonl")
        assert {row["answer"] for row in completions} == {"Paris", "Lima"}
    if part == "an algorithm":
        assert last["optim/grad_norm"] > 0


def test_what_the_readme_shows_of_the_terminal_is_what_is_printed(tmp_path: Path) -> None:
    (block,) = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    command, printed = block.split("\n", 1)
    done = run_grpo(*shlex.split(command.removeprefix("$ grpo ")), cwd=tmp_path)
    assert done.stdout + done.stderr == printed


def test_every_choice_is_in_the_readme() -> None:
    """In the table of what there is to choose from, group by group."""
    from grpo.config.schema import find_conf_folder

    table = README.partition("## What there is to choose from")[2].partition("\n## ")[0]
    for group in ("algorithm", "kl", "reward", "adapter", "dataset"):
        (row,) = re.findall(rf"^\| `{group}` \| (.*) \|$", table, re.MULTILINE)
        for file in (find_conf_folder() / group).glob("[!_]*.yaml"):
            assert f"`{file.stem}`" in row, f"{group}={file.stem}"


CHOICES = re.findall(
    r"^grpo (?!resume|eval|export|chat|-m|--help)(.*?)(?:\s{2,}#.*)?$", README, re.MULTILINE
)


@pytest.mark.parametrize("command", CHOICES)
def test_what_the_readme_types_is_accepted(command: str) -> None:
    """Each line that trains composes and passes the checks."""
    overrides = [word for word in shlex.split(command) if "=" in word]
    if "--config-dir" in command or "kl_wieght=0.1" in overrides:
        return
    from grpo.config.check import check_config, check_training
    from tests.test_config import compose

    cfg = compose(*overrides)
    check_config(cfg)
    check_training(cfg)
