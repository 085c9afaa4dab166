"""The policy's forward pass over completions, with each group's prompt computed once.

Two ways to the same numbers: `shared_prefix` is the one used, `plain` is what it is checked
against when a model is loaded, and what is used for a model where the two differ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.models.head import Head, TokenScores, score_tokens

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Completions:
    """Completions of B' prompts, R of each; row b*R+r continues prompt b. A slice of a rollout."""

    prompts_BP: Tensor  # int64, left-padded
    prompt_lengths_B: Tensor
    tokens_NC: Tensor  # int64, right-padded
    mask_NC: Tensor  # bool

    @property
    def rows_a_prompt(self) -> int:
        return self.tokens_NC.shape[0] // self.prompts_BP.shape[0]


Forward = Callable[[PreTrainedModel, Head, Completions, float], TokenScores]


def left_mask(prompts_BP: Tensor, lengths_B: Tensor) -> Tensor:
    """[B, P] int64: 1 on the last `length` positions of each row."""
    width = prompts_BP.shape[1]
    positions_P = torch.arange(width, device=prompts_BP.device)
    return (positions_P >= width - lengths_B[:, None]).long()


def positions(mask: Tensor) -> Tensor:
    """Positions of real tokens counted from 0, whatever padding stands before them."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


def shared_prefix(
    model: PreTrainedModel, head: Head, batch: Completions, temperature: float
) -> TokenScores:
    """Scores [N, C] of a batch's completion tokens; zeros on padding.

    The prompt runs once and fills a key-value cache, the cache is repeated over the group, and the
    completions continue it; gradients flow through both. The head reads completion tokens alone.
    """
    rows = batch.rows_a_prompt
    prompt_mask_BP = left_mask(batch.prompts_BP, batch.prompt_lengths_B)
    prefix = model.base_model(
        input_ids=batch.prompts_BP,
        attention_mask=prompt_mask_BP,
        position_ids=positions(prompt_mask_BP),
        use_cache=True,
    )
    # Token c is predicted at token c-1, the first one at the prompt's last token.
    hidden_ND = prefix.last_hidden_state[:, -1].repeat_interleave(rows, dim=0)
    hidden_NCD = hidden_ND[:, None]
    inputs_NC = batch.tokens_NC[:, :-1]
    if inputs_NC.shape[1] > 0:
        cache = prefix.past_key_values
        cache.batch_repeat_interleave(rows)
        mask = torch.cat(
            [prompt_mask_BP.repeat_interleave(rows, dim=0), batch.mask_NC[:, :-1].long()], dim=1
        )
        continued = model.base_model(
            input_ids=inputs_NC,
            attention_mask=mask,
            position_ids=positions(mask)[:, -inputs_NC.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        )
        hidden_NCD = torch.cat([hidden_NCD, continued.last_hidden_state], dim=1)
    scores = head.score(hidden_NCD[batch.mask_NC], batch.tokens_NC[batch.mask_NC], temperature)
    return TokenScores(*(scatter(part, batch.mask_NC) for part in scores))


def plain(
    model: PreTrainedModel, head: Head, batch: Completions, temperature: float
) -> TokenScores:
    """The same scores the usual way: each row's prompt again, the model's own full logits."""
    rows, width = batch.rows_a_prompt, batch.tokens_NC.shape[1]
    prompt_mask_NP = left_mask(batch.prompts_BP, batch.prompt_lengths_B).repeat_interleave(rows, 0)
    tokens = torch.cat([batch.prompts_BP.repeat_interleave(rows, dim=0), batch.tokens_NC], dim=1)
    mask = torch.cat([prompt_mask_NP, batch.mask_NC.long()], dim=1)
    logits = model(
        input_ids=tokens, attention_mask=mask, position_ids=positions(mask), use_cache=False
    ).logits
    logits_NCV = logits[:, -width - 1 : -1].float()
    scores = score_tokens(logits_NCV, batch.tokens_NC, temperature)
    return TokenScores(*(part.masked_fill(~batch.mask_NC, 0.0) for part in scores))


def scatter(values_T: Tensor, mask_NC: Tensor) -> Tensor:
    """[T] values back to their places in [N, C]; zeros elsewhere."""
    return torch.zeros(mask_NC.shape, dtype=values_T.dtype, device=values_T.device).masked_scatter(
        mask_NC, values_T
    )


@torch.no_grad()
def agrees_with_plain(model: PreTrainedModel, head: Head) -> bool:
    """Whether `shared_prefix` gives this model's own log-probabilities, tried on random tokens.

    A model may change its logits after the head, or keep a state that can't be repeated over a
    group; which ones do is not written down anywhere, so it is measured, once for each load.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, head.vocabulary, (2, 16), generator=generator).to(model.device)
    lengths_B = torch.tensor([8, 5], device=model.device)
    mask_NC = torch.ones(4, 4, dtype=torch.bool, device=model.device)
    mask_NC[1, 2:] = False
    batch = Completions(tokens[:, :8], lengths_B, tokens[:, 8:].reshape(4, 4), mask_NC)
    try:
        ours = shared_prefix(model, head, batch, 0.7).logprobs
    except (AttributeError, NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        # E.g. a state-space model, which has no key-value cache to repeat.
        log.warning("a shared prompt fails: %s: %s", type(error).__name__, error)
        return False
    theirs = plain(model, head, batch, 0.7).logprobs
    tolerance = 1e-3 if ours.dtype == torch.float32 and not torch.is_autocast_enabled() else 5e-2
    return bool(torch.allclose(ours, theirs, atol=tolerance, rtol=tolerance))
