"""What other libraries refuse is told in one line, with exit code 2, before training begins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from grpo.models.files import PACKAGE_FOLDER

Grpo = Callable[..., tuple[int, str]]
JOB = ("experiment=smoke", "max_steps=1", "dataset.size=24", "dataset.eval_size=4", "kl_weight=0")
LOCAL = ("tracking=none", "model=local", "model.path=model")


def run_refused(grpo: Grpo, *overrides: str) -> str:
    """The one line that a refusal prints; nothing of the run is left."""
    code, printed = grpo(*JOB, "hydra.run.dir=run", *overrides)
    said = [line for line in printed.splitlines() if line.startswith("grpo: ")]
    assert code == 2, printed
    assert len(said) == 1
    assert "Traceback" not in printed
    assert not Path("run").exists()
    return said[0]


def copy_tiny_with(config: dict[str, Any], **files: str) -> None:
    """The tiny model in ./model with other keys in its config, and other files."""
    shutil.copytree(PACKAGE_FOLDER / "tiny", "model")
    file = Path("model/config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    for name, content in files.items():
        Path("model", name.replace("__", ".")).write_text(content)


@pytest.mark.parametrize(
    ("config", "files", "reason"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, {}, "requires"),
        ({"quantization_config": {"quant_method": "hqq"}}, {}, "hqq"),
        ({"model_type": "of_tomorrow"}, {}, "of_tomorrow"),
        ({"num_attention_heads": "many"}, {}, "num_attention_heads"),
        ({"hidden_size": 7}, {}, ""),
        ({}, {"tokenizer__json": '{"version": "1.0"}'}, ""),
        ({}, {"tokenizer__json": "{"}, ""),
    ],
    ids=lambda value: "",
)
def test_a_model_that_cant_be_loaded(
    config: dict[str, Any], files: dict[str, str], reason: str, grpo: Grpo
) -> None:
    copy_tiny_with(config, **files)
    line = run_refused(grpo, *LOCAL)
    assert line.startswith("grpo: model: transformers can't load this as a causal model: ")
    assert reason in line


def test_weights_that_are_missing_are_not_made_up(grpo: Grpo) -> None:
    copy_tiny_with({"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5})
    assert "has no weights for model.layers.4" in run_refused(grpo, *LOCAL)


def test_weights_that_are_quantized_already_are_not_trained(grpo: Grpo) -> None:
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    tiny = AutoModelForCausalLM.from_pretrained(
        PACKAGE_FOLDER / "tiny", quantization_config=four_bits
    )
    tiny.save_pretrained("model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(PACKAGE_FOLDER / "tiny" / name, "model")
    for adapter in ("none", "lora", "qlora"):
        assert "already quantized" in run_refused(grpo, *LOCAL, f"adapter={adapter}")


def test_a_template_that_takes_no_system_message(grpo: Grpo) -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('only users') }}{% endif %}"
    copy_tiny_with({}, chat_template__jinja=refuses + "{{ messages[-1].content }}")
    line = run_refused(grpo, *LOCAL)
    assert "set dataset.system_prompt=null" in line
    assert "only users" in line


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("adapter.target='('", "adapter.target=( "),
        ("adapter.target=nowhere", "adapter.target=nowhere"),
    ],
)
def test_a_target_that_peft_refuses(override: str, reason: str, grpo: Grpo) -> None:
    line = run_refused(grpo, "tracking=none", "adapter=lora", override)
    assert reason in line


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("tracking.wandb.project=team/thing", "tracking.wandb.project=team/thing: "),
        (f"tracking.wandb.project={'p' * 129}", "1 to 128 characters"),
        ("tracking.wandb.project=''", "1 to 128 characters"),
        (f"tracking.wandb.tags=[fine,{'t' * 65}]", "1 to 64 characters"),
        ("tracking.wandb.tags=fine", "should be a list: [fine]"),
        ("tracking.wandb.mode=online", "tracking.wandb.mode=online: "),
    ],
)
def test_what_wandb_refuses(override: str, reason: str, grpo: Grpo) -> None:
    assert reason in run_refused(grpo, "tracking=wandb", override)


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("WANDB_RUN_ID", "one?", "WANDB_RUN_ID=one?: "),
        ("WANDB_RUN_ID", " one", "begin or end with a space"),
        ("WANDB_MODE", "sideways", "tracking.wandb: "),
    ],
)
def test_what_wandb_refuses_of_the_environment(
    variable: str, value: str, reason: str, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert reason in run_refused(grpo, "tracking=wandb")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("kl.target=choice(0.5, null)", "choice() takes no null; write kl.target=0.5, null"),
        ("seed=range(one,two)", "range(one,two) can't be evaluated"),
        ("seed=int(first)", "int(first) can't be evaluated (invalid literal"),
        ("learning_rate=interval(1)", "missing a required argument: 'end'"),
        ("seed=pick(1,2)", "Unknown function 'pick' Available: "),
        ("seed=[1,2", "not an override; write key=value"),
    ],
)
def test_why_hydra_cant_read_an_override(override: str, reason: str, grpo: Grpo) -> None:
    code, printed = grpo("-m", override)
    assert code == 2
    assert printed.count("\n") == 1
    assert reason in printed
    assert "See " not in printed
