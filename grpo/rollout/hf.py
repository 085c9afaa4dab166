"""transformers' own `generate`: slower, and right for any causal model that it knows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig

from grpo.models.forward import Completions, left_mask
from grpo.models.load import LanguageModel
from grpo.models.pad import pad_left
from grpo.rollout.engine import Row, in_shares
from grpo.types import Prompt, Rollout


class HFEngine:
    """`model.generate` with nothing but the temperature; log-probabilities from the policy."""

    def __init__(self, policy: LanguageModel, max_new_tokens: int, token_budget: int) -> None:
        """token_budget: rows times prompt and completion tokens at once."""
        self.policy, self.max_new_tokens, self.token_budget = policy, max_new_tokens, token_budget

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], num_generation: int, temperature: float, seed: int
    ) -> Rollout:
        """As `Engine.generate` says."""
        own = self.policy.model.generation_config
        # A model's own config may cut off top-k or top-p, or penalise repetition, unasked.
        self.policy.model.generation_config = self._neutral(num_generation, temperature)
        try:
            with torch.random.fork_rng(), self.policy.device.autocast():
                torch.manual_seed(seed)
                return in_shares(
                    self.policy,
                    prompts,
                    num_generation,
                    self.max_new_tokens,
                    self.token_budget,
                    lambda share: self._sample(share, num_generation, temperature),
                )
        finally:
            self.policy.model.generation_config = own

    def _neutral(self, num_generation: int, temperature: float) -> GenerationConfig:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            num_return_sequences=num_generation if temperature else 1,
            eos_token_id=list(self.policy.end_ids),
            pad_token_id=self.policy.pad_id,
            **(sampling if temperature else {"do_sample": False}),
        )

    def _sample(self, prompts: Sequence[Prompt], group: int, temperature: float) -> list[Row]:
        policy, device = self.policy, self.policy.device.torch_device
        prompts_BP, lengths_B = pad_left([p.token_ids for p in prompts], policy.pad_id, device)
        generated = policy.model.generate(
            input_ids=prompts_BP, attention_mask=left_mask(prompts_BP, lengths_B)
        )
        tokens_NC = generated[:, prompts_BP.shape[1] :]
        if not temperature:
            tokens_NC = tokens_NC.repeat_interleave(group, dim=0)
        ends_NC = torch.isin(tokens_NC, torch.tensor(policy.end_ids, device=device))
        ended_N = ends_NC.any(dim=1)
        width = tokens_NC.shape[1]
        lengths_N = torch.where(ended_N, ends_NC.int().argmax(dim=1) + 1, width)
        mask_NC = torch.arange(width, device=device) < lengths_N[:, None]
        scored = policy.score(
            Completions(prompts_BP, lengths_B, tokens_NC, mask_NC), temperature or 1.0
        )
        return [
            Row(tokens_NC[n, :length], scored.logprobs[n, :length], bool(ended_N[n]))
            for n, length in enumerate(lengths_N.tolist())
        ]
