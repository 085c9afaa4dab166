"""Writes a plain model's folder from a checkpoint that holds an adapter.

    python scripts/merge_adapter.py CHECKPOINT FOLDER

CHECKPOINT is a run or one of its checkpoints. What was trained over 4-bit weights is merged into
those weights, in full precision.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from grpo.device import open_device
from grpo.errors import ConfigError
from grpo.hub import holds_adapter
from grpo.models.adapter import load_adapter, merged
from grpo.models.find import base_folder
from grpo.models.load import in_four_bits, in_full
from grpo.past import model_of_checkpoint


def merge(checkpoint: str, folder: Path) -> None:
    """Raises ConfigError where the checkpoint holds no adapter, or the folder something."""
    adapter = model_of_checkpoint(checkpoint)
    if not holds_adapter(adapter):
        raise ConfigError(f"{adapter}: holds a whole model, so there is nothing to merge.")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: is not empty.")
    device, base = open_device("cpu", "fp32"), base_folder(adapter)
    if was_quantized(adapter):
        model = in_four_bits(base, device).dequantize(torch.float32)
    else:
        model = in_full(base, device)
    load_adapter(model, adapter)
    merged(model).save_pretrained(folder)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(folder)


def was_quantized(adapter: Path) -> bool:
    """Whether the run that this adapter is from had its base in 4 bits."""
    config = adapter.parent / "config.json"
    return config.is_file() and bool(json.loads(config.read_text())["adapter"]["quantized"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    try:
        merge(arguments.checkpoint, arguments.folder)
    except ConfigError as error:
        raise SystemExit(f"merge_adapter: {error}") from error
    print(f"written to {arguments.folder}")


if __name__ == "__main__":
    main()
