"""Samples with vLLM (2309.06180) in this process, from a copy of the policy's current weights.

Its kernels and precision differ, so its log-probabilities are not exactly the policy's; the update
corrects for that, as for every sampler (`grpo.training.update`).
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.dynamic_module_utils import custom_object_save

from grpo.errors import ConfigError
from grpo.memory.budget import Budget
from grpo.memory.estimate import count_cache_bytes
from grpo.models.adapter import has_adapter, iterate_merged_weights
from grpo.models.load import LanguageModel
from grpo.rollout.engine import InvalidLogits, SampledCompletion, assemble_rollout
from grpo.types import Prompt, Rollout, Sampling

VLLM_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # run in this process, which has the weights
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # training uses the same cores
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class VLLMEngine:
    """Samples with `vllm.LLM`. On a GPU, it frees its memory while the policy is trained."""

    def __init__(self, policy: LanguageModel, max_new_tokens: int, budget: Budget) -> None:
        """
        Raises:
            ConfigError: vLLM is not installed, or can't run this model.
        """
        if getattr(policy.model, "is_quantized", False):
            raise ConfigError(
                "rollout=vllm: vLLM can't take over 4-bit weights; use rollout=native.",
                key="rollout",
                value="vllm",
            )
        self.policy, self.max_new_tokens, self.budget = policy, max_new_tokens, budget
        self.sleeps = policy.device.torch_device.type == "cuda"
        os.environ.update(VLLM_ENVIRONMENT)
        try:
            from vllm import LLM
        except ImportError as error:
            raise ConfigError(
                f"rollout=vllm: vLLM can't be imported ({error}): pip install 'grpo-bench[vllm]'"
            ) from error
        try:
            with tempfile.TemporaryDirectory() as folder, undisturbed():
                write_model_description(policy, folder)
                self.llm: Any = LLM(folder, **self._build_settings())
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"rollout=vllm: vLLM can't run {type(policy.model).__name__}: {error}; use "
                f"rollout=native."
            ) from error
        self._sleep()

    def _build_settings(self) -> dict[str, Any]:
        dtype = self.policy.device.autocast_dtype or torch.float32
        positions = self.budget.cache_limit.max_at_once
        cache = int(count_cache_bytes(self.policy) * positions)
        longest = min(self.policy.context_length, positions)
        gpu_settings = {}
        if self.sleeps:
            weights = sum(x.numel() for x in self.policy.model.parameters()) * dtype.itemsize
            free, total = torch.cuda.mem_get_info(self.policy.device.torch_device)
            gpu_settings["gpu_memory_utilization"], room = compute_gpu_share(free, total, weights)
            cache = min(cache, room)
        return {
            **gpu_settings,
            "load_format": "dummy",  # the weights are copied before each rollout
            "trust_remote_code": self.policy.trust_remote_code,
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": longest,
            "kv_cache_memory_bytes": cache,
            # Reading a prompt in chunks rewinds its generator, which fails on a CPU (vLLM 0.32).
            "enable_chunked_prefill": self.sleeps,
            "max_num_batched_tokens": max(8192, longest),
            "enforce_eager": not self.sleeps,
            "enable_sleep_mode": self.sleeps,
            "logprobs_mode": "processed_logprobs",  # under the distribution that is sampled from
            "generation_config": "vllm",  # no defaults of the model, which may set top-k
        }

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        num_generation: int,
        sampling: Sampling,
        seed: int,
        share: Sequence[int] | None = None,
    ) -> Rollout:
        """Implements `Engine.generate`."""
        generator = torch.Generator().manual_seed(seed)
        seeds_B = torch.randint(0, 2**31, (len(prompts),), generator=generator).tolist()
        if share is not None:
            prompts, seeds_B = [prompts[b] for b in share], [seeds_B[b] for b in share]
        requests = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts]
        group = num_generation if sampling.temperature else 1  # greedy completions are all equal
        parameters = [
            self._make_sampling_params(sampling, group, prompt_seed) for prompt_seed in seeds_B
        ]
        with undisturbed():
            self._load_weights()
            outputs = self.llm.generate(requests, parameters, use_tqdm=False)
            self._sleep()
        rows = [
            self._make_row(prompt, completion)
            for prompt, output in zip(prompts, outputs, strict=True)
            for completion in output.outputs * (num_generation // group)
        ]
        return assemble_rollout(self.policy, prompts, rows, exact_logprobs=False)

    def _make_sampling_params(self, sampling: Sampling, group: int, seed: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            n=group,
            seed=seed,
            temperature=sampling.temperature,
            repetition_penalty=sampling.repetition_penalty,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            stop=list(sampling.stop),
            include_stop_str_in_output=True,
            stop_token_ids=list(self.policy.end_ids),
            ignore_eos=True,  # stop_token_ids has all end tokens
            max_tokens=self.max_new_tokens,
            logprobs=0,  # only the sampled token's
            detokenize=bool(sampling.stop),
            skip_special_tokens=False,
        )

    def _make_row(self, prompt: Prompt, completion: Any) -> SampledCompletion:
        device = self.policy.device.torch_device
        tokens = list(completion.token_ids)
        pairs = zip(completion.logprobs, tokens, strict=True)
        logprobs = [choices[token].logprob for choices, token in pairs]
        for written, logprob in enumerate(logprobs):
            if not math.isfinite(logprob):
                raise InvalidLogits(prompt, written)
        return SampledCompletion(
            torch.tensor(tokens, device=device),
            torch.tensor(logprobs, dtype=torch.float32, device=device),
            completion.finish_reason == "stop",
        )

    def _load_weights(self) -> None:
        """Copies the policy's current weights into vLLM."""
        if self.sleeps:
            self.llm.wake_up(tags=["weights"])
        # The model's `load_weights` would not do: vLLM may have packed its weights after loading.
        weights = iterate_plain_weights(self.policy.model)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()

    def _sleep(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=2)


WORKSPACE_GB = 2.0  # vLLM's activations, captured graphs and buffers


def compute_gpu_share(free: int, total: int, weights: int) -> tuple[float, int]:
    """Returns vLLM's share of a GPU that also holds the policy, and the bytes for vLLM's cache.

    vLLM refuses to start if less than its share of the total memory is free; the default is 0.9.

    Args:
        free, total: bytes of the GPU's memory.
        weights: bytes of vLLM's copy of the model.

    Raises:
        ConfigError: no memory is left for a cache.
    """
    share = math.floor(95 * free / total) / 100
    room = int(share * total - weights - WORKSPACE_GB * 1e9)
    if room <= 0:
        raise ConfigError(
            f"rollout=vllm: {free / 1e9:.1f} GB of the GPU are free beside the policy, and vLLM's "
            f"copy of it takes {weights / 1e9:.1f} GB and {WORKSPACE_GB:g} GB of workspace: use "
            f"rollout=native, adapter=lora or a smaller model."
        )
    return share, room


def write_model_description(policy: LanguageModel, folder: str) -> None:
    """Writes the model's config and tokenizer, and its Python code if that is trusted."""
    model = policy.model
    if policy.trust_remote_code and model._auto_class is not None:
        custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def iterate_plain_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields names and weights as a checkpoint of the model without adapter has them.

    An adapter is merged one layer at a time, so that no second copy of the model is made.
    """
    yield from iterate_merged_weights(model) if has_adapter(model) else model.named_parameters()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within it, vLLM may change torch's random state and threads, which are restored after it."""
    threads, setter = torch.get_num_threads(), torch.set_num_threads
    with torch.random.fork_rng():
        try:
            yield
        finally:
            torch.set_num_threads = setter  # on a CPU, vLLM replaces it by a no-op
            torch.set_num_threads(threads)
