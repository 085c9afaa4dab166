"""Low-rank adapters (LoRA, 2106.09685) beside frozen weights, by peft."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from grpo.errors import ConfigError, format_error

log = logging.getLogger(__name__)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it talks

POLICY_ADAPTER, REFERENCE_ADAPTER = "default", "reference"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """What is trained in the place of the weights."""

    rank: int
    alpha: float  # the adapter's output is scaled by alpha / rank
    target: str | list[str]  # all-linear, or the names of modules
    rslora: bool  # scaled by alpha / sqrt(rank) instead (2312.03732)
    dora: bool  # a magnitude of its own for each column (2402.09353)
    quantized: bool  # the frozen weights in 4 bits: QLoRA (2305.14314)


def add_adapter(model: PreTrainedModel, adapter: Adapter, seed: int) -> None:
    """Adds a fresh adapter, which changes nothing yet, and freezes everything else.

    Raises:
        ConfigError: the model has no such modules.
    """
    from peft import LoraConfig

    target = adapter.target if isinstance(adapter.target, str) else list(adapter.target)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GPT-2's layers are transposed: peft sees that and says so
        torch.manual_seed(seed)
        try:
            config = LoraConfig(
                r=adapter.rank,
                lora_alpha=adapter.alpha,
                lora_dropout=0.0,  # a dropout would break the ratios
                target_modules=target,
                use_rslora=adapter.rslora,
                use_dora=adapter.dora,
                task_type="CAUSAL_LM",
            )
            model.add_adapter(config)
        except Exception as error:  # of peft, of a regular expression, of a quantizer
            raise ConfigError(
                f"adapter.target={adapter.target} dora={adapter.dora}: peft can't adapt "
                f"{type(model).__name__} so: {format_error(error)}"
            ) from error
    if any("lora_" in name for name, _ in model.get_output_embeddings().named_parameters()):
        raise ConfigError(
            f"adapter.target={adapter.target}: the output layer is read apart from the model, so "
            f"it can't be adapted; leave it out.",
            key="adapter.target",
            value=adapter.target,
        )
    inputs = model.get_input_embeddings().named_parameters()
    if model.config.get_text_config().tie_word_embeddings and any("lora_" in n for n, _ in inputs):
        raise ConfigError(
            f"adapter.target={adapter.target}: this model's embeddings are its output layer too, "
            f"so they can't be adapted alone; leave them out.",
            key="adapter.target",
            value=adapter.target,
        )
    prepare_new_modules(model)


def prepare_new_modules(model: PreTrainedModel) -> None:
    """Fresh modules come in training mode, and in the precision of the weights beside them."""
    from peft.tuners.tuners_utils import cast_adapter_dtype

    model.eval()
    cast_adapter_dtype(model, POLICY_ADAPTER, autocast_adapter_dtype=True)


def has_adapter(model: nn.Module) -> bool:
    return bool(getattr(model, "peft_config", None))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within it, the model is exactly what it was before it had adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


@contextmanager
def adapter_active(model: nn.Module, name: str) -> Iterator[None]:
    """Within it, the model works with another of its adapters; which are trained stays as it is."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = [name]
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._active_adapter = was


def add_reference_adapter(model: PreTrainedModel) -> None:
    """A second adapter, equal to the first and never trained: a reference that can be moved."""
    trained = {name: weight.requires_grad for name, weight in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter(copy.deepcopy(model.peft_config[POLICY_ADAPTER]), REFERENCE_ADAPTER)
    model.set_adapter(POLICY_ADAPTER)
    prepare_new_modules(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.requires_grad_(trained.get(name, False))
        for twin, weight in pair_adapter_weights(model):
            twin.copy_(weight)


def pair_adapter_weights(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Each weight of the frozen twin with the one of the policy that it stands for."""
    weights = dict(model.named_parameters())
    return [
        (weight, weights[name.replace(f".{REFERENCE_ADAPTER}.", f".{POLICY_ADAPTER}.")])
        for name, weight in weights.items()
        if f".{REFERENCE_ADAPTER}." in name
    ]


def save_adapter(
    model: PreTrainedModel, folder: Path, base: str, revision: str | None = None
) -> None:
    """Writes a folder that transformers and peft load by path, the base model found by its name.

    Args:
        base: a hub id or a folder.
        revision: of the hub id.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(
        model, adapter_name=POLICY_ADAPTER, save_embedding_layers=False
    )
    # peft writes DoRA's magnitudes without `.weight`, and transformers then drops them unread.
    named = {
        f"base_model.model.{name}"
        + (".weight" if name.endswith("magnitude_vector") else ""): weight
        for name, weight in weights.items()
    }
    save_file(
        {name: weight.contiguous() for name, weight in named.items()},
        folder / ADAPTER_WEIGHTS,
        metadata={"format": "pt"},
    )
    config = copy.deepcopy(model.peft_config[POLICY_ADAPTER])
    config.base_model_name_or_path, config.inference_mode = base, True
    config.revision = revision
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # the same file whatever the process
    config.save_pretrained(folder)


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Puts a saved adapter's weights into the model, which is given one where it has none.

    Raises:
        ConfigError: it belongs to another model or another kind of adapter.
    """
    from peft import PeftConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    try:
        if not has_adapter(model):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.add_adapter(PeftConfig.from_pretrained(folder))
            prepare_new_modules(model)
        weights = load_file(folder / ADAPTER_WEIGHTS)
    except Exception as error:  # of peft, safetensors, or what the adapter's kind needs
        raise ConfigError(
            f"{folder}: this adapter can't be loaded: {format_error(error)}"
        ) from error
    try:
        result = set_peft_model_state_dict(model, weights)
    except RuntimeError as error:
        raise ConfigError(
            f"{folder}: this adapter is of another shape: {format_error(error)}"
        ) from error
    lacking = [
        key for key in result.missing_keys if "lora_" in key and f".{POLICY_ADAPTER}." in key
    ]
    if lacking or result.unexpected_keys:
        raise ConfigError(f"{folder}: this adapter is of another model or has other targets.")


def merge_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model with the adapter added into its weights: a plain model again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = copy_model(model)
    for name, module in list(model.named_modules()):
        if name.endswith(".base_layer") or not isinstance(module, BaseTunerLayer):
            continue
        model.set_submodule(name, merge_layer(module))
    del model.peft_config
    model._hf_peft_config_loaded = False  # else it would be saved as an adapter
    return model


@torch.no_grad()
def iterate_merged_weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights of the plain model that `merge_adapter` gives, made one layer at a time.

    Sums are in fp32, whatever precision the frozen weights are kept in.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [n for n, x in model.named_modules() if isinstance(x, BaseTunerLayer)]
    adapted = [n for n in adapted if not n.endswith(".base_layer")]
    for name, weight in model.named_parameters():
        if not any(name.startswith(f"{layer}.") for layer in adapted):
            yield name, weight.detach()
    for name in adapted:
        plain = merge_layer(copy.deepcopy(model.get_submodule(name)).float())
        for part, weight in plain.named_parameters():
            yield f"{name}.{part}", weight.detach()


def merge_layer(layer: Any) -> nn.Module:
    """The plain layer under an adapted one, which is used up.

    Two adapted weights of one module, such as a mixture's experts, are a layer in a layer.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    while isinstance(layer, BaseTunerLayer):
        layer.merge(safe_merge=True, adapter_names=[POLICY_ADAPTER])
        layer = layer.base_layer
    plain: nn.Module = layer
    return plain


def copy_model(model: PreTrainedModel) -> PreTrainedModel:
    """A deep copy; what a module keeps of its last forward pass loses its gradient in both.

    RecurrentGemma's keep their last state, which torch can't copy while it has one.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                setattr(module, name, value.detach())
    copied: PreTrainedModel = copy.deepcopy(model)
    return copied
