"""What a model does with long texts that it does not do with short ones.

Its positions may change with the length of a text (longrope, dynamic NTK): keys that were made
before the change are wrong after it. It may see only a part of a long text (windows, chunks), in a
way that the shared prompt does not know. Its table of positions may end.
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
FROZEN_ROPE_TYPE = (
    "held"  # in the place of a rope type that transformers computes anew at each length
)


def prepare_for_lengths(
    policy: LanguageModel, prompt_tokens: int, max_new_tokens: int
) -> LanguageModel:
    """The model as it is used for prompts and completions of up to so many tokens.

    Where its positions change with length, they are those of the longest text from here on, for
    every text, in the rollout, the reference and the update (vLLM does the same). Where a shared
    prompt gives other numbers at that length, the plain forward is used.

    Raises:
        ConfigError: it can't read so many tokens.
    """
    longest = prompt_tokens + max_new_tokens
    name = type(policy.model).__name__
    change = freeze_positions(policy.model, longest, policy.context_length)
    if change is not None and change < longest:
        log.warning(
            "%s: its positions change beyond %d tokens, which a prompt and its completion may "
            "have (%d + %d), so those for long texts are used throughout; for the others, lower "
            "max_new_tokens or dataset.max_prompt_tokens.",
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
        "%s: with a shared prompt it gives other log-probabilities at %d tokens; using the plain "
        "forward, which is slower and needs more memory.", name, longest,
    )  # fmt: skip
    return replace(policy, forward=forward_plain)


@dataclass(frozen=True)
class RotaryModule:
    """A module of transformers that makes the angles of positions, for one kind of layer."""

    module: nn.Module
    layer_type: str | None

    def compute_cosines(self, length: int) -> Tensor:
        """The cosines of the second position in a text of this length."""
        # Beyond its original length a dynamic one remembers the longest; a short text resets it.
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
        """From here on it gives what it gave last, whatever the length."""
        kinds = self.module.rope_type
        kept: Any = FROZEN_ROPE_TYPE
        if self.layer_type is not None:
            kept = {**kinds, self.layer_type: FROZEN_ROPE_TYPE}  # type: ignore[dict-item]
        self.module.rope_type = kept


def find_length_dependent(model: nn.Module) -> Iterator[RotaryModule]:
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer_type, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind):
                yield RotaryModule(module, layer_type)


def freeze_positions(model: PreTrainedModel, longest: int, context: int) -> int | None:
    """Fixes positions that change with length at those of the longest text.

    Args:
        longest: tokens of a prompt and its completion.
        context: that the model can read at most.

    Returns:
        The most tokens that a text may have before they change; None if they never do.
    """
    changes = []
    for rotations in list(find_length_dependent(model)):
        changes.append(find_first_change(rotations, max(longest, context)))
        rotations.compute_cosines(max(longest, 2))
        rotations.freeze_angles()
    return min((change for change in changes if change is not None), default=None)


def find_first_change(rotations: RotaryModule, most: int) -> int | None:
    """The greatest length up to which the angles are those of a short text, found by halving."""
    short = rotations.compute_cosines(2)
    if torch.equal(rotations.compute_cosines(most), short):
        return None
    same, other = 2, most
    while other - same > 1:
        middle = (same + other) // 2
        if torch.equal(rotations.compute_cosines(middle), short):
            same = middle
        else:
            other = middle
    return same


@torch.no_grad()
def can_read_length(policy: LanguageModel, length: int) -> bool:
    """Whether the model can be run on a text of so many tokens at all."""
    tokens = torch.zeros(1, length, dtype=torch.int64, device=policy.model.device)
    try:
        policy.model(input_ids=tokens, use_cache=False)
    except FORWARD_ERRORS:
        return False
    return True


@torch.no_grad()
def agrees_at_length(policy: LanguageModel, prompt_tokens: int, max_new_tokens: int) -> bool:
    """Whether the forward pass gives the model's own log-probabilities at this length.

    Only a shared prompt may not; of the others it is seen that they run at all. The logits are read
    in chunks on both sides, so it takes little memory.
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
        own = Features(hidden[0, prompt_tokens - 1 : -1], head, head.vocabulary)
        expected = score_completions(own, batch, readout).logprobs
        ours = score_completions(forward_shared_prompt(model, head, batch), batch, readout).logprobs
        return match_logprobs(ours, expected, computes_in_fp32(model))
