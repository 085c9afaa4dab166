"""Python code that comes with a model is run where the user says so, and nowhere else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.config.unused_keys import Facts, explain_unused_keys
from grpo.device import Device
from grpo.errors import ConfigError
from grpo.models.adapter import add_adapter
from grpo.models.files import PACKAGE_FOLDER
from grpo.models.hub import find_cached_model
from grpo.models.load import load_language_model
from grpo.models.remote_code import check_remote_code, has_remote_code, list_code_files
from grpo.rollout.vllm import write_model_description
from tests.test_adapter import LORA
from tests.test_config import compose
from tests.test_revision import FIRST, add_to_cache

Grpo = Callable[..., tuple[int, str]]
KEY = "model.trust_remote_code=true"
SHORT = (
    "experiment=smoke", "tracking=none", "max_steps=2", "checkpoint.every=1", "eval.every=0",
    "dataset.eval_size=8", "model=local", "model.path=own",
)  # fmt: skip
EVAL = ("dataset.eval_size=8", "eval.samples=1")
CODE = """
from pathlib import Path
from transformers import Qwen2Config, Qwen2ForCausalLM

Path({marker!r}).touch()


class OwnConfig(Qwen2Config):
    model_type = {kind!r}


class OwnForCausalLM(Qwen2ForCausalLM):
    config_class = OwnConfig
"""
AUTO_MAP = {
    "AutoConfig": "modeling_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What the code of the model in own/ writes when it is imported."""
    return tmp_path / "was_run"


@pytest.fixture
def own(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model as one that transformers doesn't know."""
    # Where transformers copies code to, and imports it from.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "hf"))
    folder = tmp_path / "own"
    shutil.copytree(PACKAGE_FOLDER / "tiny", folder)
    change_json(folder / "config.json", model_type="own_kind", auto_map=AUTO_MAP)
    (folder / "modeling_own.py").write_text(CODE.format(marker=str(marker), kind="own_kind"))
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param((*SHORT, "hydra.run.dir=run"), id="train"),
        pytest.param(("eval", "checkpoint=own", *EVAL), id="eval", marks=pytest.mark.slow),
        pytest.param(("chat", "own"), id="chat", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("own")
def test_it_is_not_run_unasked_nor_by_what_is_piped_in(
    arguments: tuple[str, ...], marker: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "grpo", *arguments],
        cwd=tmp_path, input="y\ny\ny\n", capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("grpo: ")
    assert "needs Python code that comes with it" in said
    assert KEY in said
    assert "modeling_own.py" in said
    assert "Traceback" not in done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    assert not marker.exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("own")
def test_it_is_run_with_the_key_and_a_runs_folder_does_not_turn_that_on(
    grpo: Grpo, marker: Path, tmp_path: Path
) -> None:
    code, printed = grpo(*SHORT, "hydra.run.dir=run", KEY)
    assert code == 0, printed
    assert marker.exists()
    saved = tmp_path / "run/checkpoints/latest/model"
    assert list_code_files(saved) == ["modeling_own.py"]
    with (saved / "modeling_own.py").open("a") as code_file:
        code_file.write("# another text, so that it would be imported anew\n")
    for command in (("eval", "checkpoint=run", *EVAL), ("resume=run", "max_steps=3")):
        marker.unlink(missing_ok=True)
        code, printed = grpo(*command)
        assert code == 2, printed
        assert f"says {KEY}" in printed
        assert "--trust" in printed
        assert not marker.exists()
        code, printed = grpo(*command, "model.trust_remote_code=false")
        assert code == 2, printed
        assert not marker.exists()
    assert grpo("eval", "checkpoint=run", *EVAL, "--trust")[0] == 0
    assert marker.exists()
    assert grpo("eval", "checkpoint=run", *EVAL, KEY)[0] == 0  # by hand


@pytest.mark.slow
@pytest.mark.usefixtures("own")
def test_a_run_goes_on_with_it_where_it_is_trusted(grpo: Grpo, tmp_path: Path) -> None:
    assert grpo(*SHORT, "hydra.run.dir=run", KEY)[0] == 0
    code, printed = grpo("resume=run", "max_steps=3", "--trust")
    assert code == 0, printed
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 3
    code, printed = grpo("resume=run", "max_steps=4", KEY)
    assert code == 0, printed


@pytest.mark.slow
@pytest.mark.usefixtures("own")
def test_an_adapter_over_it_is_merged_where_it_is_trusted(
    grpo: Grpo, marker: Path, tmp_path: Path
) -> None:
    code, printed = grpo(*SHORT, "hydra.run.dir=run", KEY, "adapter=lora")
    assert code == 0, printed
    marker.unlink()
    code, printed = grpo("export", "run", "mine")
    assert code == 2, printed
    assert "--trust" in printed
    assert not (tmp_path / "mine").exists()
    assert not marker.exists()
    code, printed = grpo("export", "run", "mine", "--trust")
    assert code == 0, printed
    assert list_code_files(tmp_path / "mine") == ["modeling_own.py"]
    assert (tmp_path / "mine/modeling_own.py").is_file()


def test_a_model_that_transformers_knows_needs_no_code(
    own: Path, marker: Path, device: Device
) -> None:
    """Many on the hub come with some, from before it did."""
    change_json(own / "config.json", model_type="qwen2")
    (own / "modeling_own.py").write_text(CODE.format(marker=str(marker), kind="qwen2"))
    model = load_language_model(own, device).model
    assert type(model).__module__.startswith("transformers.models.")
    assert not marker.exists()
    model = load_language_model(own, device, trust_remote_code=True).model
    assert type(model).__name__ == "OwnForCausalLM"
    assert marker.exists()


def test_a_tokenizer_that_only_its_code_can_read_is_refused(
    own: Path, marker: Path, device: Device
) -> None:
    change_json(own / "config.json", auto_map={})
    change_json(
        own / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": ["modeling_own.OwnTokenizer", None]},
    )
    assert has_remote_code(own)
    with pytest.raises(ConfigError, match=f"needs Python code that comes with it.*{KEY}"):
        load_language_model(own, device)
    assert not marker.exists()


def test_what_a_config_names(own: Path) -> None:
    assert has_remote_code(own)
    assert list_code_files(own) == ["modeling_own.py"]
    with pytest.raises(ConfigError, match=rf"{KEY}.*The code: modeling_own\.py\.$"):
        check_remote_code(own, trusted=False)
    check_remote_code(own, trusted=True)
    elsewhere = {key: f"org/code--{path}" for key, path in AUTO_MAP.items()}
    change_json(own / "config.json", auto_map=elsewhere)
    with pytest.raises(ConfigError, match="in another repository of the hub"):
        check_remote_code(own, trusted=False)
    (own / "config.json").write_text("{")
    check_remote_code(own, trusted=False)  # is told where the model is loaded
    assert not has_remote_code(own)
    assert not has_remote_code(PACKAGE_FOLDER / "tiny")


@pytest.mark.usefixtures("own")
def test_the_key_is_refused_or_told_where_it_does_nothing(grpo: Grpo) -> None:
    code, printed = grpo("experiment=smoke", "tracking=none", KEY)
    assert code == 2
    assert f"{KEY}: model=tiny is part of this package" in printed
    overrides = ["model=local", "model.path=x", KEY]
    (line,) = explain_unused_keys(compose(*overrides), overrides, Facts(True, 10, own_code=False))
    assert line.startswith("model.trust_remote_code=True does nothing here")
    assert not list(
        explain_unused_keys(compose(*overrides), overrides, Facts(True, 10, own_code=True))
    )


def test_a_cache_without_the_code_is_not_whole_where_the_code_is_run(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    add_to_cache(cache, "models--org--own", FIRST, own)
    assert find_cached_model("org/own", with_code=True)
    (cache / "models--org--own/snapshots" / FIRST / "modeling_own.py").unlink()
    assert find_cached_model("org/own")
    assert find_cached_model("org/own", with_code=True) is None


@pytest.mark.parametrize("adapted", [False, True])
def test_a_sampler_that_reads_a_folder_gets_the_code(
    adapted: bool, own: Path, device: Device, tmp_path: Path
) -> None:
    policy = load_language_model(own, device, trust_remote_code=True)
    if adapted:
        add_adapter(policy.model, LORA, seed=0)
    (tmp_path / "described").mkdir()
    write_model_description(policy, str(tmp_path / "described"))
    config = AutoConfig.from_pretrained(tmp_path / "described", trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert (tmp_path / "described/tokenizer.json").is_file()
