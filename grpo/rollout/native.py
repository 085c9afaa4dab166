"""The project's sampler: it reads each prompt once and writes its completions in parallel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo.errors import ConfigError
from grpo.memory.budget import Budget, split_evenly
from grpo.models.attention import compute_hidden_states
from grpo.models.cpu.select import fast_decoding
from grpo.models.forward import forward_shared_prompt
from grpo.models.load import LanguageModel
from grpo.models.tree import Tree
from grpo.rollout.cache import KVCache, PrefillPlan
from grpo.rollout.engine import InvalidLogits, SampledCompletion, StopStrings, sample_in_batches
from grpo.rollout.token_sampling import mark_prompt_tokens, sample_tokens
from grpo.types import Prompt, Rollout, Sampling

COMPACT_AT = 0.85  # drop finished rows once no more than this share is still being written


class NativeEngine:
    """Samples from the policy's model, with a key-value cache that shares prompts."""

    def __init__(self, policy: LanguageModel, max_new_tokens: int, budget: Budget) -> None:
        """
        Raises:
            ConfigError: the model can't share a prompt among its completions.
        """
        if policy.forward is not forward_shared_prompt:
            raise ConfigError(
                f"rollout=native: {type(policy.model).__name__} can't continue a shared prompt, or "
                f"changes its logits after the head; use rollout=hf."
            )
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
        """Implements `Engine.generate`. A row's random numbers don't depend on the other rows."""
        generator = torch.Generator().manual_seed(seed)
        shape = (len(prompts), num_generation, self.max_new_tokens)
        uniform_BGC = torch.rand(shape, generator=generator)
        if share is not None:
            prompts, uniform_BGC = [prompts[b] for b in share], uniform_BGC[list(share)]

        def sample(batch: Sequence[int], group: range) -> list[SampledCompletion]:
            uniform_NC = uniform_BGC[list(batch), group.start : group.stop].flatten(0, 1)
            device = self.policy.device.torch_device
            return self._sample([prompts[b] for b in batch], uniform_NC.to(device), sampling)

        policy, width = self.policy, self.max_new_tokens
        rows = len(prompts) * num_generation
        with policy.device.autocast(), fast_decoding(policy.model, rows):
            return sample_in_batches(
                policy, prompts, num_generation, width, self.budget.cache_limit, sample
            )

    def _sample(
        self, prompts: Sequence[Prompt], uniform_NC: Tensor, sampling: Sampling
    ) -> list[SampledCompletion]:
        """Samples completions in order b*G+g, for prompts that fit into memory together."""
        policy, device = self.policy, self.policy.device.torch_device
        group = len(uniform_NC) // len(prompts)
        lengths = [len(prompt.token_ids) for prompt in prompts]
        cache = KVCache(lengths, group, self.max_new_tokens, device)
        draft = PartialCompletions(policy, sampling, *uniform_NC.shape)
        logits_NV = policy.head(self._prefill(prompts, cache)).repeat_interleave(group, dim=0)
        seen_NV = None
        if sampling.repetition_penalty != 1:
            tokens = [prompt.token_ids for prompt in prompts]
            seen_NV = mark_prompt_tokens(tokens, logits_NV.shape[-1], group, device)
        while True:
            uniform_N = uniform_NC[draft.active_rows, draft.num_written]
            token_N, logprob_N = sample_tokens(logits_NV, sampling, seen_NV, uniform_N)
            if seen_NV is not None:
                seen_NV.scatter_(1, token_N[:, None], True)
            draft.append_tokens(token_N, logprob_N)
            complete, broken = draft.check_progress()
            if broken:
                row = int(draft.broken_N.nonzero()[0, 0])
                raise InvalidLogits(prompts[row // group], draft.num_written - 1)
            if complete:
                return draft.to_completions()
            keep = draft.drop_ended()
            if keep is not None:
                cache.keep_rows(keep)
                token_N = token_N[keep]
                seen_NV = None if seen_NV is None else seen_NV[keep]
            hidden_ND = compute_hidden_states(policy.model, token_N, cache.next_positions(), cache)
            cache.num_written += 1
            logits_NV = policy.head(hidden_ND)

    def _prefill(self, prompts: Sequence[Prompt], cache: KVCache) -> Tensor:
        """Returns each prompt's last hidden state [B, D], and fills the cache with the prompts."""
        device, budget = self.policy.device.torch_device, self.budget.forward_limit.tokens
        last_hidden: list[Tensor] = []
        for part in split_evenly([len(prompt.token_ids) for prompt in prompts], budget):
            tokens = [prompt.token_ids for prompt in prompts[part]]
            tree = Tree(tuple(map(len, tokens)), ())
            tokens_T = torch.tensor([token for ids in tokens for token in ids], device=device)
            plan = PrefillPlan(cache, part.start, tree)
            hidden_TD = compute_hidden_states(
                self.policy.model, tokens_T, tree.positions(device), plan
            )
            last_hidden += [hidden_TD[prompt.stop - 1] for prompt in tree.prompt_slices]
        return torch.stack(last_hidden)


class PartialCompletions:
    """Completions that are being written, and which of their rows are still in the batch."""

    def __init__(self, policy: LanguageModel, sampling: Sampling, count: int, longest: int) -> None:
        device = policy.device.torch_device
        self.ends = torch.tensor(policy.end_ids, device=device)
        self.stop = StopStrings(policy.tokenizer, sampling.stop)
        self.tokens_NC = torch.full((count, longest), policy.pad_id, device=device)
        self.logprobs_NC = torch.zeros(count, longest, device=device)
        self.lengths_N = torch.full((count,), longest, device=device)
        self.ended_N = torch.zeros(count, dtype=torch.bool, device=device)
        self.broken_N = torch.zeros(count, dtype=torch.bool, device=device)  # sampled from NaN
        self.active_rows = torch.arange(count, device=device)  # rows that are in the batch
        self.num_written = 0

    def check_progress(self) -> tuple[bool, bool]:
        """Returns whether all rows are complete, and whether a token was drawn from NaN logits."""
        ended, broken = torch.stack([self.ended_N.all(), self.broken_N.any()]).tolist()
        return self.num_written == self.tokens_NC.shape[1] or ended, broken

    def append_tokens(self, token_N: Tensor, logprob_N: Tensor) -> None:
        """Appends a token to each row in the batch, except to rows that have ended."""
        writing = ~self.ended_N[self.active_rows]
        rows = self.active_rows[writing]
        self.tokens_NC[rows, self.num_written] = token_N[writing]
        self.logprobs_NC[rows, self.num_written] = logprob_N[writing]
        self.broken_N[rows] = ~logprob_N[writing].isfinite()
        self.num_written += 1
        stops = torch.isin(token_N[writing], self.ends)
        if self.stop.stop:
            stops |= self.stop.find_stopped(self.tokens_NC[rows, : self.num_written])
        self.lengths_N[rows[stops]] = self.num_written
        self.ended_N[rows[stops]] = True

    def drop_ended(self) -> Tensor | None:
        """Removes ended rows from the batch if there are enough of them.

        Returns:
            The places of the remaining rows in the batch; None if nothing was removed.
        """
        writing = ~self.ended_N[self.active_rows]
        if int(writing.sum()) > COMPACT_AT * len(self.active_rows):
            return None
        keep = writing.nonzero()[:, 0]
        self.active_rows = self.active_rows[keep]
        return keep

    def to_completions(self) -> list[SampledCompletion]:
        """Returns all rows, without padding."""
        return [
            SampledCompletion(
                self.tokens_NC[n, :length], self.logprobs_NC[n, :length], bool(self.ended_N[n])
            )
            for n, length in enumerate(self.lengths_N.tolist())
        ]
