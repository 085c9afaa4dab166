"""Loads the weights in a folder as a model of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from grpo.device import Device
from grpo.errors import ConfigError, format_error
from grpo.models.remote_code import NEEDS_CODE


@contextmanager
def loading_errors(folder: Path) -> Iterator[None]:
    """Within it, errors of transformers, tokenizers or a quantizer become a ConfigError.

    Raises:
        ConfigError: with the folder and their reason, in one line.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # each of these libraries has its own errors
        reason = format_error(error)
        if "trust_remote_code" in str(error):  # `reason` may be only its beginning
            reason = f"it {NEEDS_CODE}"
        raise ConfigError(
            f"{folder}: transformers can't load this as a causal model: {reason}"
        ) from error


def load_in_fp32(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Loads a model on the CPU, in fp32.

    Raises:
        ConfigError: the folder has no values for some weights.
    """
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=trust_remote_code, output_loading_info=True
    )
    if missing := sorted(found["missing_keys"]):
        raise ConfigError(
            f"{folder}: has no weights for {', '.join(missing[:3])} ({len(missing)} are missing), "
            f"which would be random; use a folder of a trained causal model."
        )
    return model


def load_in_four_bits(
    folder: Path, device: Device, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Loads linear layers as 4-bit normal floats, which compute in the device's precision."""
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=device.autocast_dtype or torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        trust_remote_code=trust_remote_code,
        quantization_config=settings,
        device_map={"": device.torch_device},
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # Otherwise a forward pass without gradient repacks the weight on some CPUs, into a form
            # for inference only.
            module.support_avx512bf16_for_cpu = False
    return model
