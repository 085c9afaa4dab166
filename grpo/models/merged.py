"""Writes a checkpoint's model as a plain one, with its adapter merged into the base weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer

from grpo.device import open_device
from grpo.models.adapter import load_adapter, merge_adapter
from grpo.models.files import find_base_folder
from grpo.models.hub import holds_adapter
from grpo.models.remote_code import check_remote_code
from grpo.models.weights import load_in_four_bits, load_in_fp32, loading_errors


def write_merged(model: Path, folder: Path, trust_remote_code: bool = False) -> None:
    """Writes a model and its tokenizer to a folder that transformers can load.

    An adapter trained on 4-bit weights is merged into these weights, dequantized to fp32.

    Args:
        model: the model's folder in a checkpoint.
        folder: where to write; it may exist.
        trust_remote_code: Python code that comes with the base model may be run.

    Raises:
        ConfigError: the base model can't be found or loaded, or needs code that isn't trusted.
    """
    if not holds_adapter(model):
        shutil.copytree(model, folder, dirs_exist_ok=True)
        return
    device, base = open_device("cpu", "fp32"), find_base_folder(model, trust_remote_code)
    check_remote_code(base, trust_remote_code)
    with loading_errors(base):
        # Never None: transformers would then ask the user, and read standard input.
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        if was_quantized(model):
            quantized = load_in_four_bits(base, device, trust_remote_code=trust_remote_code)
            whole = quantized.dequantize(torch.float32)
        else:
            whole = load_in_fp32(base, trust_remote_code=trust_remote_code)
    load_adapter(whole, model)
    merge_adapter(whole).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def was_quantized(model: Path) -> bool:
    """Returns whether the run that trained this adapter had its base model in 4 bits."""
    config = model.parent / "config.json"
    return config.is_file() and bool(json.loads(config.read_text())["adapter"]["quantized"])
