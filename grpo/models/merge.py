"""A checkpoint's model as a plain one: with an adapter added into the weights it is over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer

from grpo.device import open_device
from grpo.hub import holds_adapter
from grpo.models.adapter import load_adapter, merged
from grpo.models.find import base_folder
from grpo.models.load import in_four_bits, in_full, loading_errors


def write_merged(model: Path, folder: Path) -> None:
    """Writes a folder that transformers loads by path, tokenizer included.

    What was trained over 4-bit weights is merged into those weights, in full precision.

    Args:
        model: the model's folder in a checkpoint.
    """
    if not holds_adapter(model):
        shutil.copytree(model, folder, dirs_exist_ok=True)
        return
    device, base = open_device("cpu", "fp32"), base_folder(model)
    with loading_errors(base):
        if was_quantized(model):
            whole = in_four_bits(base, device).dequantize(torch.float32)
        else:
            whole = in_full(base)
    load_adapter(whole, model)
    merged(whole).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def was_quantized(model: Path) -> bool:
    """Whether the run that this adapter is from had its base in 4 bits."""
    config = model.parent / "config.json"
    return config.is_file() and bool(json.loads(config.read_text())["adapter"]["quantized"])
