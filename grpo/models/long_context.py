"""Prepares a model for the run's longest texts, which it may treat differently from short ones.

Its positions may depend on the length of a text (longrope, dynamic NTK): cached keys are then wrong
after the change. It may attend to only a part of a long text (windows, chunks), in a way that the
shared prompt doesn't support. Its table of positions may be too short.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.errors import ConfigError, format_error
from grpo.models.adapter import has_adapter
from grpo.models.forward import (
    FORWARD_ERRORS,
    Completions,
    computes_in_fp32,
    forward_plain,
    forward_shared_prompt,
    match_logprobs,
    score_completions,
)
from grpo.models.head import Features, Readout
from grpo.models.load import LanguageModel
from grpo.types import Sampling

log = logging.getLogger(__name__)
FROZEN_ROPE_TYPE = "held"  # replaces a rope type that transformers computes again for each length


def prepare_for_lengths(
    policy: LanguageModel, prompt_tokens: int, max_new_tokens: int
) -> LanguageModel:
    """Returns the model, prepared for prompts and completions of up to so many tokens.

    If its positions depend on the length, those of the longest text are used for every text, in
    the rollout, the reference and the update (vLLM does the same). If a shared prompt gives other
    numbers at that length, the plain forward is used.

    Raises:
        ConfigError: the model can't read so many tokens.
    """
    longest = prompt_tokens + max_new_tokens
    name = type(policy.model).__name__
    change = freeze_positions(policy.model, longest, policy.context_length)
    if change is not None and change < longest:
        log.warning(
            "%s: its positions change beyond %d tokens, and a prompt and its completion may have "
            "more (%d + %d), so those for long texts are used throughout; for those of short "
            "texts, lower max_new_tokens or dataset.max_prompt_tokens.",
            name, change, prompt_tokens, max_new_tokens,
        )  # fmt: skip
    elif change is not None:
        policy = replace(policy, context_length=change)
    try:
        agrees = agrees_at_length(policy, prompt_tokens, max_new_tokens)
    except FORWARD_ERRORS as error:
        if not can_read_length(policy, 2):
            adapted = " with this adapter" if has_adapter(policy.model) else ""
            raise ConfigError(
                f"{name}{adapted}: its forward pass fails: {format_error(error)}"
            ) from error
        raise ConfigError(
            f"max_new_tokens={max_new_tokens}: {name} can't read {longest} tokens, a prompt of "
            f"{prompt_tokens} and its completion ({format_error(error)}); lower it or "
            f"dataset.max_prompt_tokens.",
            key="max_new_tokens",
            value=max_new_tokens,
        ) from error
    if agrees:
        return policy
    log.warning(
        "%s: a shared prompt doesn't give its log-probabilities at %d tokens; using the plain "
        "forward, which is slower and needs more memory.", name, longest,
    )  # fmt: skip
    return replace(policy, forward=forward_plain)


@dataclass(frozen=True)
class RotaryModule:
    """A module of transformers that computes rotary angles, for one type of layer."""

    module: nn.Module
    layer_type: str | None

    def compute_cosines(self, length: int) -> Tensor:
        """Returns the cosines of the second position in a text of this length."""
        # A dynamic module remembers the longest text beyond its original length; a short one
        # resets it.
        self._angles(2)
        return self._angles(length)

    def _angles(self, length: int) -> Tensor:
        weight = next(iter(self.module.buffers()))
        x = torch.zeros(1, device=weight.device)
        positions = torch.tensor([[1, length - 1]], device=weight.device)
        options = {} if self.layer_type is None else {"layer_type": self.layer_type}
        cosines: Tensor = self.module(x, positions, **options)[0][0, 0]
        return cosines.clone()

    def freeze_angles(self) -> None:
        """Makes the module use its last angles for texts of all lengths."""
        kinds = self.module.rope_type
        frozen: Any = FROZEN_ROPE_TYPE
        if self.layer_type is not None:
            frozen = {**kinds, self.layer_type: FROZEN_ROPE_TYPE}  # type: ignore[dict-item]
        self.module.rope_type = frozen


def find_length_dependent(model: nn.Module) -> Iterator[RotaryModule]:
    """Yields the model's rotary modules whose angles depend on the length of the text."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer_type, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind):
                yield RotaryModule(module, layer_type)


def freeze_positions(model: PreTrainedModel, longest: int, context: int) -> int | None:
    """Fixes positions that depend on the length at those of the longest text.

    Args:
        longest: the most tokens of a prompt and its completion.
        context: the most tokens that the model can read.

    Returns:
        The most tokens of a text with the positions of a short one; None if they never change.
    """
    changes = []
    for rotary in list(find_length_dependent(model)):
        changes.append(find_first_change(rotary, max(longest, context)))
        rotary.compute_cosines(max(longest, 2))
        rotary.freeze_angles()
    return min((change for change in changes if change is not None), default=None)


def find_first_change(rotary: RotaryModule, most: int) -> int | None:
    """Returns the longest length with the angles of a short text, found by bisection.

    None if they are the same at length `most`.
    """
    short = rotary.compute_cosines(2)
    if torch.equal(rotary.compute_cosines(most), short):
        return None
    same, other = 2, most
    while other - same > 1:
        middle = (same + other) // 2
        if torch.equal(rotary.compute_cosines(middle), short):
            same = middle
        else:
            other = middle
    return same


@torch.no_grad()
def can_read_length(policy: LanguageModel, length: int) -> bool:
    """Returns whether the model can be run on a text of so many tokens."""
    tokens = torch.zeros(1, length, dtype=torch.int64, device=policy.model.device)
    try:
        policy.model(input_ids=tokens, use_cache=False)
    except FORWARD_ERRORS:
        return False
    return True


@torch.no_grad()
def agrees_at_length(policy: LanguageModel, prompt_tokens: int, max_new_tokens: int) -> bool:
    """Returns whether the forward pass gives the model's own log-probabilities at this length.

    Compares a shared prompt with the model; the plain forward is only run once, for its errors.
    Both sides compute logits in chunks, so it needs little memory.
    """
    model, head, device = policy.model, policy.head, policy.model.device
    generator = torch.Generator().manual_seed(0)
    shape = (1, prompt_tokens + max_new_tokens)
    tokens = torch.randint(0, head.vocabulary, shape, generator=generator).to(device)
    with policy.device.autocast():
        hidden = model.base_model(input_ids=tokens, use_cache=False)[0]
        if policy.forward is not forward_shared_prompt:
            return True
        completion = tokens[:, prompt_tokens:]
        batch = Completions(
            tokens[:, :prompt_tokens],
            torch.tensor([prompt_tokens], device=device),
            completion,
            torch.ones_like(completion, dtype=torch.bool),
        )
        readout = Readout(Sampling(temperature=1.0))
        features = Features(hidden[0, prompt_tokens - 1 : -1], head, head.vocabulary)
        expected = score_completions(features, batch, readout).logprobs
        ours = score_completions(forward_shared_prompt(model, head, batch), batch, readout).logprobs
        return match_logprobs(ours, expected, computes_in_fp32(model))
