"""A causal language model as the rest uses it, loaded from a folder."""

from __future__ import annotations

import copy
import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grpo.device import Device
from grpo.errors import ConfigError
from grpo.models.forward import (
    Completions,
    Forward,
    agrees_with_plain,
    plain,
    score_completions,
    shared_prefix,
)
from grpo.models.head import Features, Head, Readout, TokenScores

log = logging.getLogger(__name__)
transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True)
class LanguageModel:
    """A model with what GRPO asks of it. Always in eval mode: dropout would break the ratios."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: Head
    forward: Forward
    end_ids: tuple[int, ...]  # every token that ends a completion
    context: int  # the most tokens that prompt and completion may have together
    device: Device

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else self.end_ids[0]

    def features(self, batch: Completions) -> Features:
        """What a forward pass knows of each completion token."""
        with self.device.autocast():
            return self.forward(self.model, self.head, batch)

    def score(
        self, batch: Completions, readout: Readout, reference: Features | None = None
    ) -> TokenScores:
        """Scores [N, C] of completion tokens; zeros on padding."""
        with self.device.autocast():
            return score_completions(self.features(batch), batch, readout, reference)


def load_language_model(folder: Path, device: Device) -> LanguageModel:
    """Loads a model in fp32, checks it against itself, and puts it on the device.

    Raises:
        ConfigError: the folder doesn't hold a causal language model that can be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"{folder}: transformers can't load this as a causal model: {error}"
        ) from error
    model.eval().to(device.torch_device)
    head = Head(model)
    return LanguageModel(
        model=model,
        tokenizer=tokenizer,
        head=head,
        forward=choose_forward(model, head),
        end_ids=end_ids(model, tokenizer),
        context=getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**20,
        device=device,
    )


def frozen_copy(policy: LanguageModel) -> LanguageModel:
    """The reference: the policy as it is now, never trained."""
    model = copy.deepcopy(policy.model).requires_grad_(False)
    return replace(policy, model=model, head=Head(model))


def choose_forward(model: PreTrainedModel, head: Head) -> Forward:
    if agrees_with_plain(model, head):
        return shared_prefix
    log.warning(
        "%s: its log-probabilities can't be had from a shared prompt; using the plain forward, "
        "which is slower and needs more memory.",
        type(model).__name__,
    )
    return plain


def fingerprint(model: PreTrainedModel) -> str:
    """Tells one model's weights from another's: a hash of a few numbers of each."""
    total = hashlib.sha256()
    for name, weight in model.state_dict().items():
        sample = weight.flatten()[:: max(1, weight.numel() // 16)].cpu().float()
        total.update(name.encode() + sample.numpy().tobytes())
    return total.hexdigest()[:16]


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every end-of-sequence id that the generation config names, else the tokenizer's."""
    for source in (model.generation_config, model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)
    raise ConfigError(f"{type(model).__name__} names no end-of-sequence token.")
