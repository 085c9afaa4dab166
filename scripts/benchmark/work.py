"""The work that both sides are given: a model that never ends a completion, prompts, a reward."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from settings import SYSTEM_PROMPT, Setting

ROOT = Path(__file__).resolve().parents[2]
END = "<|never|>"  # a token past the model's vocabulary: no completion can hold it
ROWS = 400


def load_gsm8k(path: Path | None) -> list[dict[str, str]]:
    """GSM8K's training rows: from a .jsonl, or from the hub."""
    if path is not None:
        return [json.loads(line) for line in path.read_text().splitlines()]
    from datasets import load_dataset

    return list(load_dataset("openai/gsm8k", "main", split="train"))


def prepare(setting: Setting, rows: list[dict[str, str]], folder: Path) -> None:
    """Writes model/, rows.jsonl, prompts.json and worked.json, from which both sides read."""
    worked = rows[-setting.worked_examples :] if setting.worked_examples else []
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:ROWS]))
    chats = [build_chat(row, worked) for row in rows[:ROWS]]
    (folder / "prompts.json").write_text(json.dumps(chats))
    (folder / "worked.json").write_text(json.dumps(worked))
    copy_without_end(find_base_model(setting.model, folder), folder / "model")


def build_chat(row: dict[str, str], worked: list[dict[str, str]]) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": SYSTEM_PROMPT}]
    for example in worked:
        messages.append({"role": "user", "content": example["question"]})
        messages.append({"role": "assistant", "content": example["answer"]})
    return [*messages, {"role": "user", "content": row["question"]}]


def find_base_model(name: str, folder: Path) -> Path:
    """A folder with the model: packaged, from PyPI or the hub, or with random weights."""
    from omegaconf import OmegaConf

    from grpo.models.files import PACKAGE_FOLDER, find_model_folder

    if name == "tiny":
        return PACKAGE_FOLDER / "tiny"
    if name == "qwen2":
        return build_random_qwen2(PACKAGE_FOLDER / "tiny", folder / "base")
    config = OmegaConf.load(ROOT / "conf" / "model" / "smollm2_135m.yaml")
    return find_model_folder(
        config.name, config.id, None, None, OmegaConf.to_container(config.wheel)
    )


def build_random_qwen2(tokenizer: Path, folder: Path) -> Path:
    """Qwen2-0.5B's architecture with random weights, and the packaged model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True,
        eos_token_id=0,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def copy_without_end(source: Path, folder: Path) -> None:
    """A copy of a model whose end-of-sequence token it can't write."""
    from transformers import AutoTokenizer

    folder.mkdir()
    for file in source.iterdir():
        if file.suffix in (".safetensors", ".json"):
            shutil.copy(file, folder)
    size = json.loads((source / "config.json").read_text())["vocab_size"]
    tokenizer = AutoTokenizer.from_pretrained(source)
    spare = [f"<|spare{n}|>" for n in range(size - len(tokenizer))]
    pad = tokenizer.pad_token
    tokenizer.add_special_tokens({"additional_special_tokens": [*spare, END]})
    # A chat template that ends what the assistant says names that token as an end, too.
    tokenizer.chat_template = tokenizer.chat_template.replace(tokenizer.eos_token, "")
    tokenizer.add_special_tokens({"eos_token": END, "pad_token": pad})
    assert tokenizer.eos_token_id == size, (tokenizer.eos_token_id, size)
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, "eos_token_id": size}))


def vowel_share(text: str) -> float:
    """A reward that differs from one completion to the next: the share of vowels."""
    return sum(letter in "aeiou" for letter in text) / max(1, len(text))


def reward(samples: Any) -> list[float]:
    """The same, as the project calls it."""
    return [vowel_share(sample.completion) for sample in samples]
