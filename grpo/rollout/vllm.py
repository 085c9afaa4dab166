"""vLLM (2309.06180) in this process: it samples from a copy of the policy, made anew each time.

Its kernels and its precision are others, so its log-probabilities are not quite the policy's; the
update corrects for that, as for every sampler (`grpo.training.update`).
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
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, where the weights are
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the cores are the training's too
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class VLLMEngine:
    """`vllm.LLM`; on a GPU it sleeps, and holds no memory, while the policy is trained."""

    def __init__(self, policy: LanguageModel, max_new_tokens: int, budget: Budget) -> None:
        """
        Raises:
            ConfigError: vLLM is not installed, or can't run this model.
        """
        if getattr(policy.model, "is_quantized", False):
            raise ConfigError(
                "rollout=vllm: weights in 4 bits can't be handed over; use rollout=native.",
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
        beside = {}
        if self.sleeps:
            weights = sum(x.numel() for x in self.policy.model.parameters()) * dtype.itemsize
            free, total = torch.cuda.mem_get_info(self.policy.device.torch_device)
            beside["gpu_memory_utilization"], room = compute_gpu_share(free, total, weights)
            cache = min(cache, room)
        return {
            **beside,
            "load_format": "dummy",  # the weights are handed over before each rollout
            "trust_remote_code": self.policy.trust_remote_code,
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": longest,
            "kv_cache_memory_bytes": cache,
            # A prompt read in pieces steps back in its seeded generator; a CPU's can't (vLLM 0.32).
            "enable_chunked_prefill": self.sleeps,
            "max_num_batched_tokens": max(8192, longest),
            "enforce_eager": not self.sleeps,
            "enable_sleep_mode": self.sleeps,
            "logprobs_mode": "processed_logprobs",  # of what is sampled from
            "generation_config": "vllm",  # nothing of a model's own, which may cut off top-k
        }

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], num_generation: int, sampling: Sampling, seed: int
    ) -> Rollout:
        """As `Engine.generate` says."""
        asked = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts]
        generator = torch.Generator().manual_seed(seed)
        seeds_B = torch.randint(0, 2**31, (len(prompts),), generator=generator).tolist()
        group = num_generation if sampling.temperature else 1  # greedy ones are all the same
        parameters = [self._make_sampling_params(sampling, group, own) for own in seeds_B]
        with undisturbed():
            self._load_weights()
            written = self.llm.generate(asked, parameters, use_tqdm=False)
            self._sleep()
        rows = [
            self._make_row(prompt, completion)
            for prompt, request in zip(prompts, written, strict=True)
            for completion in request.outputs * (num_generation // group)
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
            ignore_eos=True,  # what ends is said above
            max_tokens=self.max_new_tokens,
            logprobs=0,  # of the sampled token alone
            detokenize=bool(sampling.stop),
            skip_special_tokens=False,
        )

    def _make_row(self, prompt: Prompt, completion: Any) -> SampledCompletion:
        device = self.policy.device.torch_device
        tokens = list(completion.token_ids)
        of_each = zip(completion.logprobs, tokens, strict=True)
        logprobs = [choices[token].logprob for choices, token in of_each]
        if not all(map(math.isfinite, logprobs)):
            raise InvalidLogits(prompt, 0)
        return SampledCompletion(
            torch.tensor(tokens, device=device),
            torch.tensor(logprobs, dtype=torch.float32, device=device),
            completion.finish_reason == "stop",
        )

    def _load_weights(self) -> None:
        """Gives it the policy's weights as they are now."""
        if self.sleeps:
            self.llm.wake_up(tags=["weights"])
        # Not the model's own `load_weights`: vLLM may have packed its weights since it loaded them.
        weights = iterate_plain_weights(self.policy.model)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()

    def _sleep(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=2)


WORKSPACE_GB = 2.0  # activations, captured graphs and buffers of vLLM's own


def compute_gpu_share(free: int, total: int, weights: int) -> tuple[float, int]:
    """What vLLM may take of a GPU that the policy is on already, and what of it is for its cache.

    vLLM refuses to start where less is free than its share of the whole, 0.9 unless it is told.

    Args:
        free, total: bytes of the GPU's memory.
        weights: bytes of vLLM's copy of the model.

    Raises:
        ConfigError: there is no room for a cache.
    """
    share = math.floor(95 * free / total) / 100
    room = int(share * total - weights - WORKSPACE_GB * 1e9)
    if room <= 0:
        raise ConfigError(
            f"rollout=vllm: {free / 1e9:.1f} GB of the GPU are free beside the policy, and vLLM's "
            f"copy of it takes {weights / 1e9:.1f} GB and {WORKSPACE_GB:g} GB to work with: use "
            f"rollout=native, adapter=lora or a smaller model."
        )
    return share, room


def write_model_description(policy: LanguageModel, folder: str) -> None:
    """Writes what says how a model is built, its own code included where that is trusted."""
    model = policy.model
    if policy.trust_remote_code and model._auto_class is not None:
        custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def iterate_plain_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and weights as a checkpoint of the model alone has them, one after the other.

    An adapter is added into each layer by itself, so that no second model is ever there.
    """
    yield from iterate_merged_weights(model) if has_adapter(model) else model.named_parameters()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within it, vLLM may seed torch's generators and settle its threads; then all is put back."""
    threads, setter = torch.get_num_threads(), torch.set_num_threads
    with torch.random.fork_rng():
        try:
            yield
        finally:
            torch.set_num_threads = setter  # on a CPU vLLM puts one there that does nothing
            torch.set_num_threads(threads)
