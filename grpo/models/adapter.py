"""Low-rank adapters (LoRA, 2106.09685) on frozen weights, with peft."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from grpo.errors import ConfigError, format_error

log = logging.getLogger(__name__)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it logs

POLICY_ADAPTER, REFERENCE_ADAPTER = "default", "reference"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """The settings of an adapter, which is trained in place of the weights."""

    rank: int
    alpha: float  # the adapter's output is scaled by alpha / rank
    target: str | list[str]  # all-linear, or the names of modules
    rslora: bool  # scaled by alpha / sqrt(rank) instead (2312.03732)
    dora: bool  # trains a separate magnitude for each output (2402.09353)
    quantized: bool  # the frozen weights in 4 bits: QLoRA (2305.14314)


def add_adapter(model: PreTrainedModel, adapter: Adapter, seed: int) -> None:
    """Adds a fresh adapter, which doesn't change the output yet, and freezes everything else.

    Raises:
        ConfigError: peft can't adapt these modules, or they are the output layer.
    """
    from peft import LoraConfig

    target = adapter.target if isinstance(adapter.target, str) else list(adapter.target)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft handles GPT-2's transposed layers, with a warning
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
        except Exception as error:  # raised by peft, a regular expression or a quantizer
            raise ConfigError(
                f"adapter.target={adapter.target} dora={adapter.dora}: peft can't adapt "
                f"{type(model).__name__} with these: {format_error(error)}"
            ) from error
    if any("lora_" in name for name, _ in model.get_output_embeddings().named_parameters()):
        raise ConfigError(
            f"adapter.target={adapter.target}: the output layer is computed separately from the "
            f"model, so it can't be adapted; leave it out.",
            key="adapter.target",
            value=adapter.target,
        )
    inputs = model.get_input_embeddings().named_parameters()
    if model.config.get_text_config().tie_word_embeddings and any("lora_" in n for n, _ in inputs):
        raise ConfigError(
            f"adapter.target={adapter.target}: this model's embeddings are also its output layer, "
            f"so they can't be adapted alone; leave them out.",
            key="adapter.target",
            value=adapter.target,
        )
    prepare_new_modules(model)


def prepare_new_modules(model: PreTrainedModel, adapter: str = POLICY_ADAPTER) -> None:
    """Puts new modules, made in training mode and the frozen weights' dtype, into eval and fp32."""
    from peft.tuners.tuners_utils import cast_adapter_dtype

    model.eval()
    cast_adapter_dtype(model, adapter, autocast_adapter_dtype=True)


def has_adapter(model: nn.Module) -> bool:
    """Returns whether peft has added an adapter to the model."""
    return bool(getattr(model, "peft_config", None))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within it, the model computes without its adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was_disabled in zip(layers, before, strict=True):
            layer._disable_adapters = was_disabled


@contextmanager
def adapter_active(model: nn.Module, name: str) -> Iterator[None]:
    """Within it, the model uses the adapter of this name; which are trained is unchanged."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = [name]
        yield
    finally:
        for layer, was_active in zip(layers, before, strict=True):
            layer._active_adapter = was_active


def add_reference_adapter(model: PreTrainedModel) -> None:
    """Adds a frozen copy of the adapter: a reference that can be moved toward the policy."""
    trained = {name: weight.requires_grad for name, weight in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter(copy.deepcopy(model.peft_config[POLICY_ADAPTER]), REFERENCE_ADAPTER)
    model.set_adapter(POLICY_ADAPTER)
    prepare_new_modules(model, REFERENCE_ADAPTER)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.requires_grad_(trained.get(name, False))
        for reference_weight, policy_weight in pair_adapter_weights(model):
            reference_weight.copy_(policy_weight)


def pair_adapter_weights(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Returns pairs of a weight of the reference's adapter and the same weight of the policy's."""
    weights = dict(model.named_parameters())
    return [
        (weight, weights[name.replace(f".{REFERENCE_ADAPTER}.", f".{POLICY_ADAPTER}.")])
        for name, weight in weights.items()
        if f".{REFERENCE_ADAPTER}." in name
    ]


def save_adapter(
    model: PreTrainedModel,
    folder: Path,
    base: str,
    revision: str | None = None,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes a folder that transformers and peft can load; it names the base model.

    Args:
        base: the base model's hub id or folder.
        revision: the revision of the hub id.
        state: the model's weights, if they are divided among processes.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(
        model, state, adapter_name=POLICY_ADAPTER, save_embedding_layers=False
    )
    # peft names DoRA's magnitudes without `.weight`, and transformers ignores such names.
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
        config.target_modules = sorted(config.target_modules)  # the same file in each process
    config.save_pretrained(folder)


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Loads a saved adapter's weights into the model, to which it adds an adapter if it has none.

    Raises:
        ConfigError: the adapter can't be loaded, or belongs to another model or kind of adapter.
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
    except Exception as error:  # raised by peft, safetensors or a library that the adapter needs
        raise ConfigError(f"{folder}: can't load this adapter: {format_error(error)}") from error
    try:
        result = set_peft_model_state_dict(model, weights)
    except RuntimeError as error:
        raise ConfigError(
            f"{folder}: this adapter has another shape: {format_error(error)}"
        ) from error
    missing = [
        key for key in result.missing_keys if "lora_" in key and f".{POLICY_ADAPTER}." in key
    ]
    if missing or result.unexpected_keys:
        raise ConfigError(f"{folder}: this adapter belongs to another model or has other targets.")


def merge_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy of the model with the adapter merged into its weights: a plain model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = copy_model(model)
    for name, module in list(model.named_modules()):
        if name.endswith(".base_layer") or not isinstance(module, BaseTunerLayer):
            continue
        model.set_submodule(name, merge_layer(module))
    del model.peft_config
    model._hf_peft_config_loaded = False  # else transformers would save it as an adapter
    return model


@torch.no_grad()
def iterate_merged_weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the names and weights of `merge_adapter`'s model, merged one layer at a time.

    Merged in fp32, whatever the precision of the frozen weights.
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
    """Merges the adapter into the layer under it, and returns that layer.

    Layers can be nested: a module with two adapted weights, such as a mixture's experts, is.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    while isinstance(layer, BaseTunerLayer):
        layer.merge(safe_merge=True, adapter_names=[POLICY_ADAPTER])
        layer = layer.base_layer
    plain: nn.Module = layer
    return plain


def copy_model(
    model: PreTrainedModel, copy_weight: Callable[[nn.Parameter], nn.Parameter] | None = None
) -> PreTrainedModel:
    """Returns a deep copy; detaches what modules keep of their last forward pass, in both models.

    RecurrentGemma's modules keep their last state, which torch can't copy while it has a gradient.

    Args:
        copy_weight: returns the copy's weight in place of the model's; None copies each as it is.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                setattr(module, name, value.detach())
    weights = {} if copy_weight is None else {id(w): copy_weight(w) for w in model.parameters()}
    copied: PreTrainedModel = copy.deepcopy(model, weights)
    return copied
