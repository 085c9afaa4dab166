"""What only some choices need is an extra: it is refused by name where it is missing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.config.check import EXTRA_OF_TARGET, check_config
from grpo.config.extras import require_extra
from grpo.errors import ConfigError
from tests.test_config import compose

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
EXTRAS = dict(re.findall(r"^(\w+) = (\[.*?\]) *(?:#.*)?$", PYPROJECT, re.MULTILINE))
NEEDED = {
    "dataset=reasoning_gym dataset.task=chain_sum": "gym",
    "reward=math": "math",
    "reward=[answer,math]": "math",
    "tracking=trackio": "dashboard",
    "tracking=[wandb,trackio]": "dashboard",
    "adapter=qlora": "quantized",
    "optim.name=adamw_8bit": "quantized",
    "rollout=vllm": "vllm",
}


@pytest.mark.parametrize("choice", NEEDED)
def test_a_choice_whose_package_is_missing_names_its_extra(
    choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpo.config.extras.find_spec", lambda package: None)
    wanted = rf"needs \w+, which is not installed: pip install 'grpo-bench\[{NEEDED[choice]}\]'$"
    with pytest.raises(ConfigError, match=wanted):
        check_config(compose(*choice.split()))


def test_the_default_config_needs_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo.config.extras.find_spec", lambda package: None)
    check_config(compose())
    check_config(compose("adapter=lora", "hydra/sweeper=optuna", "dataset=gsm8k"))


def test_every_extra_that_is_named_brings_its_package() -> None:
    for _, package, extra in EXTRA_OF_TARGET.values():
        assert f'"{package.replace("_", "-")}' in EXTRAS[extra]
    with pytest.raises(ConfigError, match=r"grpo dashboard: needs no_such_package"):
        require_extra("grpo dashboard", "no_such_package", "dashboard")


@pytest.mark.slow
def test_a_run_imports_nothing_that_an_extra_brings(tmp_path: Path) -> None:
    """The packages of extras are hidden; a run with its report, and a sweep, work without them."""
    hidden = (
        "reasoning_gym pebble math_verify trackio optuna_dashboard starlette uvicorn gguf cmaes"
    )
    program = (
        f"import sys; sys.modules |= dict.fromkeys({hidden.split()})\n"
        "from grpo.cli.main import main; main()"
    )
    overrides = ["experiment=smoke", "tracking=none", "max_steps=1", "dataset.eval_size=4"]
    for command in (
        [*overrides, "hydra.run.dir=run"],
        ["-m", *overrides, "seed=0,1", "sweep_dir=s"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *command], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/report.html").is_file()
    assert (tmp_path / "s/report.html").is_file()


def read_lock(name: str) -> dict[str, str]:
    """A package, with its marker, and its version."""
    text = (ROOT / "requirements" / f"{name}.lock").read_text()
    lines = re.findall(r"^([\w.-]+)==(\S+)( ;.*?)? \\$", text, re.MULTILINE)
    return {f"{package} {version}": version for package, version, _ in lines}


def test_the_runs_lock_is_a_part_of_the_tests_lock() -> None:
    run, dev = read_lock("run"), read_lock("dev")
    assert run.items() <= dev.items()
    assert len(run) < 0.6 * len(dev)
    assert not {name for name in run if name.startswith(("torch ", "nvidia", "playwright", "trl"))}
    for name in ("run", "dev"):
        text = (ROOT / "requirements" / f"{name}.lock").read_text()
        assert "://" not in text
        for block in re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]:
            assert "--hash=sha256:" in block, block
