"""Samples with transformers' `generate`: slower, but correct for all causal models it knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from grpo.memory.budget import Budget
from grpo.models.forward import Completions, left_mask
from grpo.models.head import Readout
from grpo.models.load import LanguageModel
from grpo.models.padding import pad_left
from grpo.rollout.engine import InvalidLogits, SampledCompletion, StopStrings, sample_in_batches
from grpo.seeds import derive_seed
from grpo.types import Prompt, Rollout, Sampling


class HFEngine:
    """Samples with `model.generate` and only the given settings; the policy scores the tokens."""

    def __init__(self, policy: LanguageModel, max_new_tokens: int, budget: Budget) -> None:
        self.policy, self.max_new_tokens, self.budget = policy, max_new_tokens, budget

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        num_generation: int,
        sampling: Sampling,
        seed: int,
        share: Sequence[int] | None = None,
    ) -> Rollout:
        """Implements `Engine.generate`. Another share of the prompts gives other completions."""
        if share is not None:
            prompts, seed = [prompts[b] for b in share], derive_seed(seed, share[0])
        original_config = self.policy.model.generation_config
        try:
            with torch.random.fork_rng(), self.policy.device.autocast():
                torch.manual_seed(seed)
                return sample_in_batches(
                    self.policy,
                    prompts,
                    num_generation,
                    self.max_new_tokens,
                    self.budget.cache_limit,
                    lambda batch, group: self._sample(
                        [prompts[b] for b in batch], len(group), sampling
                    ),
                    # generate penalises the padding before a shorter prompt like seen tokens.
                    same_length_only=self.policy.reads_padding or sampling.repetition_penalty != 1,
                )
        finally:
            self.policy.model.generation_config = original_config

    def _make_generation_config(self, group: int, sampling: Sampling) -> GenerationConfig:
        """Builds a config without the model's defaults, which may set top-k, top-p or a penalty."""
        sampled: dict[str, Any] = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p or None,
            "num_return_sequences": group,
        }
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            eos_token_id=list(self.policy.end_ids),
            pad_token_id=self.policy.pad_id,
            repetition_penalty=sampling.repetition_penalty,
            **(sampled if sampling.temperature else {"do_sample": False}),
        )

    def _sample(
        self, prompts: Sequence[Prompt], group: int, sampling: Sampling
    ) -> list[SampledCompletion]:
        policy, device = self.policy, self.policy.device.torch_device
        prompts_BP, lengths_B = pad_left([p.token_ids for p in prompts], policy.pad_id, device)
        ends = EndCriteria(policy, sampling, prompts_BP.shape[1])
        policy.model.generation_config = self._make_generation_config(group, sampling)
        generated = policy.model.generate(
            input_ids=prompts_BP,
            attention_mask=left_mask(prompts_BP, lengths_B),
            stopping_criteria=StoppingCriteriaList([ends]),
            logits_processor=LogitsProcessorList([CheckedLogits(prompts, prompts_BP.shape[1])]),
        )
        tokens_NC = generated[:, prompts_BP.shape[1] :]
        if not sampling.temperature:
            tokens_NC = tokens_NC.repeat_interleave(group, dim=0)
        width = tokens_NC.shape[1]
        ended_NC = torch.stack(
            [ends.find_ended(tokens_NC[:, : c + 1]) for c in range(width)], dim=1
        )
        ended_N = ended_NC.any(dim=1)
        lengths_N = torch.where(ended_N, ended_NC.int().argmax(dim=1) + 1, width)
        mask_NC = torch.arange(width, device=device) < lengths_N[:, None]
        scored = policy.score_batch(
            Completions(prompts_BP, lengths_B, tokens_NC, mask_NC), Readout(sampling)
        )
        return [
            SampledCompletion(tokens_NC[n, :length], scored.logprobs[n, :length], bool(ended_N[n]))
            for n, length in enumerate(lengths_N.tolist())
        ]


class CheckedLogits(LogitsProcessor):  # type: ignore[misc]
    """Returns logits unchanged; raises InvalidLogits if they are NaN or infinite."""

    def __init__(self, prompts: Sequence[Prompt], prompt_width: int) -> None:
        self.prompts, self.prompt_width = prompts, prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        broken_N = ~scores.amax(dim=-1).isfinite()
        if bool(broken_N.any()):
            row = int(broken_N.nonzero()[0, 0])
            prompt = self.prompts[row * len(self.prompts) // len(scores)]
            raise InvalidLogits(prompt, input_ids.shape[1] - self.prompt_width)
        return scores


class EndCriteria(StoppingCriteria):  # type: ignore[misc]
    """Ends a row at an end-of-sequence token or a stop string."""

    def __init__(self, policy: LanguageModel, sampling: Sampling, prompt_width: int) -> None:
        self.end_ids = torch.tensor(policy.end_ids, device=policy.device.torch_device)
        self.stop = StopStrings(policy.tokenizer, sampling.stop)
        self.prompt_width = prompt_width

    def find_ended(self, tokens_NC: Tensor) -> Tensor:
        """Returns [N] bool: whether the last token of each row ends its completion."""
        return torch.isin(tokens_NC[:, -1], self.end_ids) | self.stop.find_stopped(tokens_NC)

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        return self.find_ended(input_ids[:, self.prompt_width :])
