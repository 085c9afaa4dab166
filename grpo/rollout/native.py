"""The project's own sampler: each prompt is read once, its cache repeated over the group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo.errors import ConfigError
from grpo.models.forward import left_mask, positions, shared_prefix
from grpo.models.load import LanguageModel
from grpo.models.pad import pad_left
from grpo.models.warp import warp
from grpo.rollout.engine import Row, StopStrings, in_shares
from grpo.types import Prompt, Rollout, Sampling

COMPACT_AT = 0.7  # drop finished rows once no more than this share is still being written


class NativeEngine:
    """Samples from the policy itself, with the weights it has at that moment."""

    def __init__(self, policy: LanguageModel, max_new_tokens: int, token_budget: int) -> None:
        """token_budget: cache positions held at once, rows times prompt and completion tokens.

        Raises:
            ConfigError: the model's distribution can't be had from a shared prompt's cache.
        """
        if policy.forward is not shared_prefix:
            raise ConfigError(
                f"rollout=native: {type(policy.model).__name__} can't continue a shared prompt, or "
                f"changes its logits after the head; use rollout=hf."
            )
        self.policy, self.max_new_tokens, self.token_budget = policy, max_new_tokens, token_budget

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], num_generation: int, sampling: Sampling, seed: int
    ) -> Rollout:
        """As `Engine.generate` says."""
        generator = torch.Generator(device=self.policy.device.torch_device).manual_seed(seed)

        def sample(share: Sequence[Prompt]) -> list[Row]:
            return self._sample(share, num_generation, sampling, generator)

        width = self.max_new_tokens
        return in_shares(self.policy, prompts, num_generation, width, self.token_budget, sample)

    def _sample(
        self, prompts: Sequence[Prompt], group: int, sampling: Sampling, generator: torch.Generator
    ) -> list[Row]:
        """The completions of prompts that fit in memory together, in order b*G+g."""
        policy, device = self.policy, self.policy.device.torch_device
        prompts_BP, lengths_B = pad_left([p.token_ids for p in prompts], policy.pad_id, device)
        prompt_mask_BP = left_mask(prompts_BP, lengths_B)
        ends = torch.tensor(policy.end_ids, device=device)
        stop = StopStrings(policy.tokenizer, sampling.stop)

        with policy.device.autocast():
            read = policy.model.base_model(
                input_ids=prompts_BP,
                attention_mask=prompt_mask_BP,
                position_ids=positions(prompt_mask_BP),
                use_cache=True,
            )
            cache = read.past_key_values
            cache.batch_repeat_interleave(group)
            mask = prompt_mask_BP.repeat_interleave(group, dim=0)
            logits_NV = policy.head(read.last_hidden_state[:, -1]).repeat_interleave(group, dim=0)
            position_N1 = lengths_B.repeat_interleave(group)[:, None]

            count = len(prompts) * group
            tokens_NC = torch.full((count, self.max_new_tokens), policy.pad_id, device=device)
            logprobs_NC = torch.zeros(count, self.max_new_tokens, device=device)
            lengths_N = torch.full((count,), self.max_new_tokens, device=device)
            ended_N = torch.zeros(count, dtype=torch.bool, device=device)
            alive = torch.arange(count, device=device)  # the rows still in the batch
            seen_NV = seen_tokens(prompts_BP, prompt_mask_BP, logits_NV.shape[-1], group, sampling)
            for c in range(self.max_new_tokens):
                token_N, logprob_N = draw(logits_NV, sampling, seen_NV, generator)
                writing = ~ended_N[alive]
                tokens_NC[alive[writing], c] = token_N[writing]
                logprobs_NC[alive[writing], c] = logprob_N[writing]
                stops = torch.isin(token_N, ends)
                if sampling.stop:
                    stops |= stop.reached(tokens_NC[alive, : c + 1])
                stops &= writing
                if seen_NV is not None:
                    seen_NV.scatter_(1, token_N[:, None], True)
                lengths_N[alive[stops]] = c + 1
                ended_N[alive[stops]] = True
                left = int((~ended_N[alive]).sum())
                if left == 0 or c + 1 == self.max_new_tokens:
                    break
                if left <= COMPACT_AT * len(alive):
                    keep = (~ended_N[alive]).nonzero()[:, 0]
                    alive, token_N, position_N1 = alive[keep], token_N[keep], position_N1[keep]
                    mask = mask[keep]
                    seen_NV = None if seen_NV is None else seen_NV[keep]
                    cache.batch_select_indices(keep)
                mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
                step = policy.model.base_model(
                    input_ids=token_N[:, None],
                    attention_mask=mask,
                    position_ids=position_N1,
                    past_key_values=cache,
                    use_cache=True,
                )
                logits_NV = policy.head(step.last_hidden_state[:, -1])
                position_N1 = position_N1 + 1
        return [
            Row(tokens_NC[n, :length], logprobs_NC[n, :length], bool(ended_N[n]))
            for n, length in enumerate(lengths_N.tolist())
        ]


def seen_tokens(
    prompts_BP: Tensor, mask_BP: Tensor, vocabulary: int, group: int, sampling: Sampling
) -> Tensor | None:
    """[N, V] bool: the tokens of each row's prompt, where a penalty asks for them."""
    if sampling.repetition_penalty == 1:
        return None
    counts_BV = torch.zeros(len(prompts_BP), vocabulary, device=prompts_BP.device)
    counts_BV.scatter_add_(1, prompts_BP, mask_BP.float())
    return (counts_BV > 0).repeat_interleave(group, dim=0)


def draw(
    logits_NV: Tensor, sampling: Sampling, seen_NV: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability under the distribution that it is drawn from."""
    logprobs_NV = torch.log_softmax(warp(logits_NV, sampling, seen_NV), dim=-1)
    if sampling.temperature == 0:
        token_N1 = logprobs_NV.argmax(dim=-1, keepdim=True)
    else:
        token_N1 = torch.multinomial(logprobs_NV.exp(), 1, generator=generator)
    return token_N1[:, 0], logprobs_NV.gather(1, token_N1)[:, 0]
