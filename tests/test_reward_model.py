"""A reward model: a small sequence classifier with random weights, made and saved here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from grpo.errors import ConfigError
from grpo.models.files import PACKAGE_FOLDER
from grpo.rewards import RewardModel
from grpo.types import Example, Sample

TEXTS = ["4", "12+3=15", "the answer is 7", ""]


def save_model(folder: Path, kind: type = Qwen2ForSequenceClassification, labels: int = 1) -> Path:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE_FOLDER / "tiny")
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        num_labels=labels,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_samples() -> list[Sample]:
    return [
        Sample(
            f"a prompt of many words, {text}? ", text, (1,), False, Example("2+2=", "4", float), 0
        )
        for text in TEXTS
    ]


@torch.no_grad()
def compute_outputs(folder: Path, texts: list[str]) -> torch.Tensor:
    """Returns [n, outputs], for each text by itself, without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen2ForSequenceClassification.from_pretrained(folder).eval()
    ids = [tokenizer(text, add_special_tokens=False, return_tensors="pt") for text in texts]
    return torch.cat([model(**one).logits for one in ids])


def format_chats() -> list[str]:
    start, end = "<|im_start|>", "<|im_end|>\n"
    return [f"{start}user\n2+2={end}{start}assistant\n{text}{end}" for text in TEXTS]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_it_gives_the_classifiers_output_whatever_the_batch(
    tmp_path: Path, batch_size: int
) -> None:
    folder = save_model(tmp_path)
    rewards = RewardModel(str(folder), batch_size=batch_size, device="cpu")(build_samples())
    wanted = compute_outputs(folder, format_chats())[:, 0]
    assert_close(torch.tensor(rewards), wanted, atol=1e-5, rtol=1e-4)
    assert wanted.std() > 0.01  # the scores differ


def test_without_a_padding_token_it_reads_one_at_a_time(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    config = Qwen2Config.from_pretrained(folder)
    config.pad_token_id = None
    config.save_pretrained(folder)
    rewards = RewardModel(str(folder), device="cpu")(build_samples())
    assert_close(
        torch.tensor(rewards), compute_outputs(folder, format_chats())[:, 0], atol=1e-5, rtol=1e-4
    )


def test_without_a_chat_template_it_reads_prompt_and_completion(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    (folder / "chat_template.jinja").unlink()
    rewards = RewardModel(str(folder), device="cpu")(build_samples())
    wanted = compute_outputs(folder, [s.prompt + s.completion for s in build_samples()])[:, 0]
    assert_close(torch.tensor(rewards), wanted, atol=1e-5, rtol=1e-4)


def test_of_several_outputs_it_gives_the_probability_of_one(tmp_path: Path) -> None:
    folder = save_model(tmp_path, labels=3)
    rewards = RewardModel(str(folder), label=2, device="cpu")(build_samples())
    wanted = compute_outputs(folder, format_chats()).softmax(1)[:, 2]
    assert_close(torch.tensor(rewards), wanted, atol=1e-5, rtol=1e-4)


def test_a_long_text_loses_its_beginning(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    long = Sample("q", "1+" * 300 + "4", (1,), False, Example("2+2=", "4", float), 0)
    longer = Sample("q", "1+" * 400 + "4", (1,), False, Example("other", "4", float), 0)
    rewards = RewardModel(str(folder), max_tokens=50, device="cpu")([long, longer])
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-5)
    (at_most,) = RewardModel(str(folder), max_tokens=10**6, device="cpu")([long])
    assert at_most != pytest.approx(rewards[0], abs=1e-3)  # 128 tokens, as many as the model takes


def test_loading_it_late_changes_nothing_that_is_sampled(tmp_path: Path) -> None:
    reward = RewardModel(str(save_model(tmp_path)), device="cpu")
    torch.manual_seed(1)
    reward(build_samples())
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))


def test_a_model_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    reward = RewardModel(str(save_model(tmp_path, kind=Qwen2ForCausalLM)), device="cpu")
    with pytest.raises(ConfigError, match=r"no weights for score.weight"):
        reward(build_samples())


@pytest.mark.parametrize(("labels", "label"), [(1, 0), (3, None), (3, 3), (3, -1)])
def test_a_label_that_the_model_does_not_have_is_refused(
    tmp_path: Path, labels: int, label: int | None
) -> None:
    """The error comes from the constructor, before anything is sampled."""
    folder = str(save_model(tmp_path, labels=labels))
    with pytest.raises(ConfigError, match=f"label={label}"):
        RewardModel(folder, label=label, device="cpu")


def test_what_is_not_there_is_refused_before_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="no model there"):
        RewardModel(str(tmp_path / "nothing"))
    shutil.copy(PACKAGE_FOLDER / "tiny" / "config.json", tmp_path)
    with pytest.raises(ConfigError, match="no model there"):
        RewardModel(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="model=org/name: is not in the local cache"):
        RewardModel("org/name")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"device": "tpu"}, "device=tpu"),
    ],
)
def test_a_bad_option_is_named_with_its_value(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        RewardModel(str(PACKAGE_FOLDER / "tiny"), **options)  # type: ignore[arg-type]
