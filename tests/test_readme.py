"""A new user's path: what the README and the pages show is run, or checked, as it stands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from tests.conftest import read_lines, run_grpo
from tests.test_config import compose

Grpo = Callable[..., tuple[int, str]]
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README} | {
    str(page.relative_to(ROOT)): page.read_text() for page in sorted(ROOT.glob("docs/**/*.md"))
}
BLOCKS = [
    block
    for text in PAGES.values()
    for block in re.findall(r"^```(python|yaml|bash|console)\n(.*?)^```", text, re.DOTALL | re.M)
]
FILES = {
    text.partition("\n")[0].removeprefix("# "): text
    for kind, text in BLOCKS
    if kind in ("python", "yaml")
} | {
    title: block
    for text in PAGES.values()
    for title, block in re.findall(r'^```yaml title="(.*)"\n(.*?)^```', text, re.DOTALL | re.M)
}
COMMANDS = [re.sub(r"\\\n\s*", "", text).strip() for kind, text in BLOCKS if kind == "bash"]
PARTS = {
    "a reward": (["my_rewards.py"], "my_rewards"),
    "a data set": (["my_data.py", "conf/dataset/capitals.yaml"], "capitals"),
    "an algorithm": (["my_algorithm.py", "conf/algorithm/policy_loss/hopeful.yaml"], "hopeful"),
}
CONFIGS = {
    "my_configs/experiment/long.yaml": ("experiment=long", "clip_high: 0.28"),
    "conf/reward/brief.yaml": ("reward=brief", "_target_: my_rewards.brief"),
}
TYPED = {  # without the comment beside it -> whether it is in the README
    re.sub(r"\s{2,}#.*", "", line): text in README
    for text in reversed(COMMANDS)
    for line in text.splitlines()
    if line.startswith("grpo ") and "--config-dir" not in line
}
OTHER_JOBS = ("export", "chat", "report", "dashboard")  # they have no config


def write(folder: Path, name: str) -> None:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(FILES[name])


@pytest.mark.parametrize(
    "part",
    [pytest.param(part, marks=[pytest.mark.slow] * (part != "a reward")) for part in PARTS],
)
def test_a_part_of_ones_own_takes_under_15_lines_and_works(part: str, tmp_path: Path) -> None:
    names, word = PARTS[part]
    assert sum(line.strip() != "" for name in names for line in FILES[name].splitlines()) < 15
    for name in names:
        write(tmp_path, name)
    (command,) = [command for command in COMMANDS if word in command]
    program, *arguments = shlex.split(command)
    assert program == "grpo"
    result = run_grpo(
        *arguments, "experiment=smoke", "max_steps=2", "tracking=none", "hydra.run.dir=run",
        cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    last = read_lines(tmp_path / "run/metrics.jsonl")[-1]
    if part == "a reward":
        assert 0 < last["reward/brief"] <= 1
        assert last["reward/mean"] == pytest.approx(
            last["reward/answer"] + 0.2 * last["reward/brief"]
        )
    if part == "a data set":
        completions = read_lines(tmp_path / "run/completions.jsonl")
        assert {row["answer"] for row in completions} == {"Paris", "Lima"}
    if part == "an algorithm":
        assert last["optim/grad_norm"] > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_of_ones_own_is_chosen(name: str, grpo: Grpo, tmp_path: Path) -> None:
    choice, effect = CONFIGS[name]
    write(tmp_path, name)
    code, printed = grpo("--config-dir", name.partition("/")[0], choice, "--cfg", "job")
    assert code == 0, printed
    assert effect in printed


def test_every_file_that_is_shown_is_tried() -> None:
    assert set(FILES) == {name for names, _ in PARTS.values() for name in names} | set(CONFIGS)


@pytest.mark.parametrize("block", [text for kind, text in BLOCKS if kind == "console"])
def test_what_is_shown_of_the_terminal_is_what_is_printed(block: str, grpo: Grpo) -> None:
    command, printed = block.split("\n", 1)
    code, said = grpo(*shlex.split(command.removeprefix("$ grpo ")))
    assert (code, said) == (2, printed)


def test_every_choice_is_in_the_readme() -> None:
    """In the table of what there is to choose from, group by group."""
    from grpo.config.schema import find_conf_folder

    table = README.partition("## What you can choose")[2].partition("\n## ")[0]
    for group in ("algorithm", "kl", "reward", "adapter", "dataset", "model", "rollout", "device"):
        (row,) = re.findall(rf"^\| `{group}` \| (.*) \|$", table, re.MULTILINE)
        for file in (find_conf_folder() / group).glob("[!_]*.yaml"):
            assert f"`{file.stem}`" in row, f"{group}={file.stem}"


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(typed, marks=[] if first else [pytest.mark.slow])
        for typed, first in TYPED.items()
    ],
)
def test_what_the_pages_type_is_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line that trains or evaluates composes and passes the checks.

    Of a sweep, its lowest and its highest values.
    """
    from grpo.cli.main import JOBS_WITHOUT_CONFIG
    from grpo.config.check import check_config, check_training
    from grpo.sweep.space import build_space, format_override, list_corners

    monkeypatch.setenv("JUDGE_KEY", "from the environment")
    words = shlex.split(command, comments=True)[1:]
    if words[0] in OTHER_JOBS:
        assert words[0] in JOBS_WITHOUT_CONFIG
        return
    overrides = [word for word in words if re.match(r"[+\w./@]+=", word)]
    overrides = [word for word in overrides if not word.startswith(("resume=", "sweep_dir="))]
    if words[0] == "eval":
        check_config(compose(*overrides, config="eval"))
        return
    parsed = OverridesParser.create().parse_overrides(overrides)
    fixed = [override.input_line for override in parsed if not override.is_sweep_override()]
    corners = list_corners(build_space(parsed))
    for values in corners[:1] + corners[1:][-1:]:
        cfg = compose(*fixed, *(format_override(key, value) for key, value in values.items()))
        check_config(cfg)
        check_training(cfg)
