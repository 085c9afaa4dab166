"""Loads a causal language model from a folder, with all that training needs of it."""

from __future__ import annotations

import hashlib
import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grpo.device import Device
from grpo.errors import ConfigError, format_error
from grpo.models.adapter import copy_model, has_adapter, load_adapter, save_adapter
from grpo.models.cpu.select import fast_forward_pass
from grpo.models.end_tokens import Decoder, find_end_ids, find_skipped_ids
from grpo.models.files import find_base_folder
from grpo.models.forward import (
    FORWARD_ERRORS,
    Completions,
    Forward,
    find_sharing_problem,
    forward_plain,
    forward_shared_prompt,
    reads_padding,
    score_completions,
)
from grpo.models.fsdp import restore_parts
from grpo.models.head import Features, Head, Readout, TokenScores
from grpo.models.precision import four_bits_in_fp32, store_frozen_weights
from grpo.models.recompute import recomputed
from grpo.models.remote_code import check_remote_code
from grpo.models.sharded import is_sharded
from grpo.models.weights import load_in_four_bits, load_in_fp32, loading_errors

log = logging.getLogger(__name__)
transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True)
class LanguageModel:
    """A model with its tokenizer and settings, always in eval mode: dropout breaks the ratios."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: Head
    forward: Forward
    end_ids: tuple[int, ...]  # every token that ends a completion
    context_length: int  # the most tokens of a prompt and its completion together
    device: Device
    base: str = ""  # the folder or hub id of the weights, without adapter
    commit: str | None = None  # the hub commit from which the weights were loaded
    fingerprint: str = ""  # a hash of the weights as they were loaded
    recompute: bool = False  # the backward pass computes activations again
    reads_padding: bool = False  # left padding changes the model's predictions
    skipped_ids: frozenset[int] = frozenset()  # tokens that a completion's text leaves out
    trust_remote_code: bool = False  # code that comes with the model may be run

    @property
    def pad_id(self) -> int:
        """The tokenizer's padding token; without one, the first end token."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else self.end_ids[0]

    @property
    def decoder(self) -> Decoder:
        """The decoder of completions to text."""
        return Decoder(self.tokenizer, self.skipped_ids)

    def compute_features(self, batch: Completions) -> Features:
        """Runs a forward pass and returns the features of each completion token."""
        recompute = self.recompute and torch.is_grad_enabled()
        recomputing = recomputed(self.model) if recompute else nullcontext()
        with self.device.autocast(), fast_forward_pass(self.model), recomputing:
            return self.forward(self.model, self.head, batch)

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are divided among the run's processes."""
        return is_sharded(self.model)

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Writes the model, or only its adapter, and the tokenizer, as transformers loads them.

        Args:
            weights: of a sharded model, as `gather_weights` returns them.
        """
        if has_adapter(self.model):
            save_adapter(self.model, folder, self.base, self.commit, weights)
        else:
            self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)

    def restore(self, folder: Path) -> None:
        """Loads the weights that `save` wrote."""
        if self.is_sharded:
            restore_parts(self.model, folder, self.trust_remote_code)
        elif has_adapter(self.model):
            load_adapter(self.model, folder)
        else:
            saved = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, trust_remote_code=self.trust_remote_code
            )
            self.model.load_state_dict(saved.state_dict())

    def score_batch(
        self, batch: Completions, readout: Readout, reference: Features | None = None
    ) -> TokenScores:
        """Runs a forward pass and returns scores [N, C] of completion tokens; zeros on padding."""
        return self.score_features(self.compute_features(batch), batch, readout, reference)

    def score_features(
        self,
        features: Features,
        batch: Completions,
        readout: Readout,
        reference: Features | None = None,
    ) -> TokenScores:
        """Returns scores [N, C] from the features of a forward pass; zeros on padding."""
        with self.device.autocast():
            return score_completions(features, batch, readout, reference)


def load_language_model(
    folder: Path,
    device: Device,
    quantized: bool = False,
    frozen: bool = False,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Loads a model in fp32, chooses its forward pass by a check, and moves it to the device.

    Args:
        folder: of a model, or of a saved adapter, whose base model is then loaded too.
        quantized: load the linear layers in 4 bits.
        frozen: the weights will not be trained, for example under an adapter, so they may be kept
            in the precision of computation.
        trust_remote_code: Python code in the folder may be run.

    Raises:
        ConfigError: the folder doesn't hold a causal language model that can be loaded, or the
            model needs code that isn't trusted.
    """
    base = find_base_folder(folder, trust_remote_code)
    check_remote_code(base, trust_remote_code)
    with loading_errors(base):
        # Never None: transformers would then ask the user, and read standard input.
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if quantized:
            model = load_in_four_bits(base, device, trust_remote_code=trust_remote_code)
        else:
            model = load_in_fp32(base, trust_remote_code=trust_remote_code)
        model.eval()
        if not (frozen or quantized):
            model.to(device.torch_device)
        head = Head(model)
    with four_bits_in_fp32(model):  # bf16's rounding could hide a difference, or look like one
        forward = choose_forward(model, head)
        pads = forward is forward_plain and reads_padding(model, head)
    fingerprint = compute_fingerprint(model)
    if frozen or quantized:
        store_frozen_weights(model.requires_grad_(False), device.autocast_dtype)
        model.to(device.torch_device)  # only now, so that a GPU never holds them in fp32
    if base != folder:
        load_adapter(model, folder)
    ends = find_end_ids(model, tokenizer, head.vocabulary)
    pad = tokenizer.pad_token_id
    return LanguageModel(
        model=model,
        tokenizer=tokenizer,
        head=head,
        forward=forward,
        end_ids=ends,
        context_length=getattr(model.config.get_text_config(), "max_position_embeddings", None)
        or 2**20,
        device=device,
        base=str(base.resolve()),
        fingerprint=fingerprint,
        # False for shared prompts: they have no padding.
        reads_padding=pads,
        skipped_ids=find_skipped_ids(tokenizer, ends, ends[0] if pad is None else pad),
        trust_remote_code=trust_remote_code,
    )


def copy_frozen(policy: LanguageModel, in_fp32: bool) -> LanguageModel:
    """Returns a frozen copy of the policy, for use as the reference.

    Args:
        in_fp32: keep the copy in fp32, as small changes of moving weights need; else it is kept in
            the precision of computation.
    """
    model = copy_model(policy.model).requires_grad_(False)
    if not in_fp32:
        store_frozen_weights(model, policy.device.autocast_dtype)
    return replace(policy, model=model, head=Head(model))


def choose_forward(model: PreTrainedModel, head: Head) -> Forward:
    """Returns the fastest forward pass that computes the model's own numbers.

    Raises:
        ConfigError: the model can't be run, or its logits are NaN or infinite.
    """
    try:
        problem = find_sharing_problem(model, head)
    except FORWARD_ERRORS as error:
        raise ConfigError(
            f"{type(model).__name__}: its forward pass fails on a few tokens: {format_error(error)}"
        ) from error
    if not problem:
        return forward_shared_prompt
    log.warning(
        "%s: a shared prompt doesn't give its log-probabilities (%s); using the plain forward, "
        "which is slower and needs more memory.",
        type(model).__name__, problem,
    )  # fmt: skip
    return forward_plain


def compute_fingerprint(model: PreTrainedModel) -> str:
    """Returns a hash of a few numbers of each weight, which identifies the model's weights."""
    total = hashlib.sha256()
    for name, weight in model.state_dict().items():
        sample = weight.flatten()[:: max(1, weight.numel() // 16)].cpu().float()
        total.update(name.encode() + sample.numpy().tobytes())
    return total.hexdigest()[:16]
