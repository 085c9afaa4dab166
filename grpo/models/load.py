"""A causal language model as the rest uses it, loaded from a folder."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
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
from grpo.models.head import Features, Head, Readout, TokenScores
from grpo.models.precision import four_bits_in_fp32, store_frozen_weights
from grpo.models.recompute import recomputed
from grpo.models.remote_code import NEEDS_CODE, check_remote_code

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
    context_length: int  # the most tokens that prompt and completion may have together
    device: Device
    base: str = ""  # where the frozen weights under an adapter are found: a folder or a hub id
    commit: str | None = None  # of the hub, that they were loaded from
    fingerprint: str = ""  # of the weights as they were loaded
    recompute: bool = False  # activations are made again in the backward pass
    reads_padding: bool = False  # what stands before a shorter prompt changes what it says
    skipped_ids: frozenset[int] = frozenset()  # tokens that the text of a completion doesn't show
    trust_remote_code: bool = False  # code that comes with the model may be run

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else self.end_ids[0]

    @property
    def decoder(self) -> Decoder:
        return Decoder(self.tokenizer, self.skipped_ids)

    def compute_features(self, batch: Completions) -> Features:
        """What a forward pass knows of each completion token."""
        again = self.recompute and torch.is_grad_enabled()
        recomputing = recomputed(self.model) if again else nullcontext()
        with self.device.autocast(), fast_forward_pass(self.model), recomputing:
            return self.forward(self.model, self.head, batch)

    def save(self, folder: Path) -> None:
        """Writes what transformers loads by path: model or adapter alone, and the tokenizer."""
        if has_adapter(self.model):
            save_adapter(self.model, folder, self.base, self.commit)
        else:
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def restore(self, folder: Path) -> None:
        """Puts back the weights that `save` wrote."""
        if has_adapter(self.model):
            load_adapter(self.model, folder)
        else:
            saved = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, trust_remote_code=self.trust_remote_code
            )
            self.model.load_state_dict(saved.state_dict())

    def score_batch(
        self, batch: Completions, readout: Readout, reference: Features | None = None
    ) -> TokenScores:
        """Scores [N, C] of completion tokens; zeros on padding."""
        return self.score_features(self.compute_features(batch), batch, readout, reference)

    def score_features(
        self,
        features: Features,
        batch: Completions,
        readout: Readout,
        reference: Features | None = None,
    ) -> TokenScores:
        """As `score`, of what a forward pass knows already."""
        with self.device.autocast():
            return score_completions(features, batch, readout, reference)


def load_language_model(
    folder: Path,
    device: Device,
    quantized: bool = False,
    frozen: bool = False,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Loads a model in fp32, checks it against itself, and puts it on the device.

    Args:
        folder: of a model, or of a saved adapter, whose base is then loaded under it.
        quantized: the linear layers in 4 bits.
        frozen: its weights will never be trained, as under an adapter, so that they may be kept in
            the precision that is computed in.
        trust_remote_code: Python code in the folder may be run.

    Raises:
        ConfigError: the folder doesn't hold a causal language model that can be loaded.
    """
    base = find_base_folder(folder, trust_remote_code)
    check_remote_code(base, trust_remote_code)
    with loading_errors(base):
        # Never None: then transformers asks, and takes what is piped in for an answer.
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if quantized:
            model = load_in_four_bits(base, device, trust_remote_code=trust_remote_code)
        else:
            model = load_in_fp32(base, trust_remote_code=trust_remote_code)
        model.eval()
        if not (frozen or quantized):
            model.to(device.torch_device)
        head = Head(model)
    with four_bits_in_fp32(model):  # else bf16's rounding would hide, or be taken for, a difference
        forward = choose_forward(model, head)
        pads = forward is forward_plain and reads_padding(model, head)
    weights = compute_fingerprint(model)
    if frozen or quantized:
        store_frozen_weights(model.requires_grad_(False), device.autocast_dtype)
        model.to(device.torch_device)  # only now: a GPU never holds them in fp32
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
        fingerprint=weights,
        # A shared prompt was compared with one that has no padding, and has none either.
        reads_padding=pads,
        skipped_ids=find_skipped_ids(tokenizer, ends, ends[0] if pad is None else pad),
        trust_remote_code=trust_remote_code,
    )


@contextmanager
def loading_errors(folder: Path) -> Iterator[None]:
    """Within it, whatever transformers, tokenizers or a quantizer raise says what can't be loaded.

    Raises:
        ConfigError: with their reason, in one line.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # each of these libraries has errors of its own
        reason = format_error(error)
        if "trust_remote_code" in str(error):  # of which `reason` may be the beginning
            reason = f"it {NEEDS_CODE}"
        raise ConfigError(
            f"{folder}: transformers can't load this as a causal model: {reason}"
        ) from error


def load_in_fp32(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """On the CPU, in fp32."""
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=trust_remote_code, output_loading_info=True
    )
    if missing := sorted(found["missing_keys"]):
        raise ConfigError(
            f"{folder}: has no weights for {', '.join(missing[:3])} ({len(missing)} are missing), "
            f"which would be random numbers; it should be a trained causal model."
        )
    return model


def load_in_four_bits(
    folder: Path, device: Device, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The linear layers as 4-bit normal floats, computed with in the device's precision."""
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
            # Else a forward without gradient repacks the weight on some CPUs, for inference alone.
            module.support_avx512bf16_for_cpu = False
    return model


def copy_frozen(policy: LanguageModel, in_fp32: bool) -> LanguageModel:
    """The reference: the policy as it is now, never trained.

    in_fp32: else in the precision that is computed in, which can't hold weights that move a little.
    """
    model = copy_model(policy.model).requires_grad_(False)
    if not in_fp32:
        store_frozen_weights(model, policy.device.autocast_dtype)
    return replace(policy, model=model, head=Head(model))


def choose_forward(model: PreTrainedModel, head: Head) -> Forward:
    """The fastest forward pass that gives the model's own numbers.

    Raises:
        ConfigError: it can't be run at all.
    """
    try:
        why_not = find_sharing_problem(model, head)
    except FORWARD_ERRORS as error:
        raise ConfigError(
            f"{type(model).__name__}: its forward pass fails on a few tokens: {format_error(error)}"
        ) from error
    if not why_not:
        return forward_shared_prompt
    log.warning(
        "%s: its log-probabilities can't be had from a shared prompt (%s); using the plain "
        "forward, which is slower and needs more memory.",
        type(model).__name__, why_not,
    )  # fmt: skip
    return forward_plain


def compute_fingerprint(model: PreTrainedModel) -> str:
    """Tells one model's weights from another's: a hash of a few numbers of each."""
    total = hashlib.sha256()
    for name, weight in model.state_dict().items():
        sample = weight.flatten()[:: max(1, weight.numel() // 16)].cpu().float()
        total.update(name.encode() + sample.numpy().tobytes())
    return total.hexdigest()[:16]
