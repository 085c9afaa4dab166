"""A folder from a stranger is data: what it names is not run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from grpo.config import trust
from grpo.config.trust import is_trusted
from tests.conftest import run_grpo

Grpo = Callable[..., tuple[int, str]]
KEY = "model.trust_remote_code=true"
REWARD = ("+reward.evil._target_={}", "+reward.evil.weight=1.0", "+reward.evil.args={}")


@pytest.fixture
def stranger(short_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """A run's folder in the working directory, with these overrides beside its own."""

    def make(*overrides: str) -> Path:
        run = tmp_path / "stranger"
        shutil.copytree(short_run, run, symlinks=True)
        file = run / ".hydra/overrides.yaml"
        file.write_text(yaml.safe_dump([*yaml.safe_load(file.read_text()), *overrides]))
        (run / "evil.py").write_text(EVIL)
        return run

    return make


EVIL = """
from pathlib import Path
Path("was_run").touch()
def score(samples):
    return [0.0] * len(samples)
"""


@pytest.mark.parametrize("command", [("eval", "checkpoint=stranger"), ("resume=stranger",)])
@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("+reward.evil._target_=subprocess.Popen", "subprocess.Popen"),
        ("+reward.evil._target_=os.system", "os.system"),
        ("+reward.evil._target_=stranger.evil.score", "stranger.evil.score"),
        ("+reward.evil={_target_: stranger.evil.score, weight: 1.0}", "stranger.evil.score"),
        ("algorithm.baseline=os.system", "algorithm.baseline=os.system"),
        ("kl.estimator=stranger.evil.score", "kl.estimator=stranger.evil.score"),
        ("model.trust_remote_code=true", "model.trust_remote_code=true"),
        ("model={trust_remote_code: true}", "model.trust_remote_code=true"),
        ("+hydra.callbacks.evil._target_=stranger.evil.score", "hydra.callbacks"),
        ("hydra.searchpath=[file:///tmp]", "hydra.searchpath"),
        ("hydra/job_logging=evil", "hydra/job_logging=evil"),
    ],
)
def test_what_a_strangers_folder_names_is_not_run(
    command: tuple[str, ...],
    override: str,
    names: str,
    stranger: Callable[..., Path],
    grpo: Grpo,
    tmp_path: Path,
) -> None:
    stranger(override)
    code, printed = grpo(*command, "tracking=none", "hydra.run.dir=out")
    assert code == 2, printed
    assert names in printed
    assert "--trust" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "was_run").exists()


def test_what_is_given_answers_for_itself_alone(
    stranger: Callable[..., Path], grpo: Grpo, tmp_path: Path
) -> None:
    """A choice of the user's own doesn't vouch for what the folder adds to it."""
    stranger(
        "+reward.evil._target_=stranger.evil.score",
        "+reward.evil.weight=1.0",
        "model.trust_remote_code=true",
    )
    for overrides, names in (
        (("reward=answer", KEY), "reward.evil._target_=stranger.evil.score"),
        (("~reward.evil", "model=tiny"), KEY),
        (("+reward.evil={weight: 2.0}", KEY), "reward.evil._target_=stranger.evil.score"),
    ):
        code, printed = grpo("eval", "checkpoint=stranger", *overrides, "hydra.run.dir=out")
        assert code == 2, printed
        assert names in printed, overrides
        assert not (tmp_path / "was_run").exists()


@pytest.mark.slow
def test_what_is_trusted_is_run_but_for_what_hydra_never_does(
    stranger: Callable[..., Path], tmp_path: Path
) -> None:
    run = stranger("+reward.evil._target_=stranger.evil.score", "+reward.evil.weight=1.0")
    trusted = ("eval", "checkpoint=stranger", "tracking=none", "--trust", "eval.samples=1")
    done = run_grpo(*trusted, "hydra.run.dir=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "was_run").exists()
    shutil.rmtree(run)
    stranger("+reward.evil._target_=subprocess.Popen", "+reward.evil.weight=1.0")
    refused = run_grpo(*trusted, "hydra.run.dir=out2", cwd=tmp_path)
    assert refused.returncode == 2
    assert "blocklisted" in refused.stderr


def test_ones_own_files_need_no_trust(
    stranger: Callable[..., Path], grpo: Grpo, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(EVIL.replace("was_run", "mine_was_run"))
    stranger("+reward.mine._target_=mine.score", "+reward.mine.weight=1.0")
    code, printed = grpo("eval", "checkpoint=stranger", "eval.samples=1", "hydra.run.dir=out")
    assert code == 0, printed
    assert (tmp_path / "mine_was_run").exists()


def test_whose_a_function_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards_of_mine.py").write_text("")
    (tmp_path / "runs/one").mkdir(parents=True)
    (tmp_path / "runs/one/evil.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)  # where the command puts it
    monkeypatch.setattr(trust.OVERRIDE_SOURCE, "folder", tmp_path / "runs/one")
    assert is_trusted("grpo.rewards.Answer")
    assert is_trusted("rewards_of_mine.score")
    for other in ("os.system", "sys.exit", "math.sqrt", "torch.load", "runs.one.evil.score"):
        assert not is_trusted(other), other
