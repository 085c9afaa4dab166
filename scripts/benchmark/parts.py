"""Single parts of a step, each in a process of its own: parts.py PART WORK SETTING OUT"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from grpo.memory.allocator import keep_freed_memory

keep_freed_memory()

import torch
from settings import SETTINGS, Setting
from transformers import GenerationConfig

from grpo.device import Device, open_device
from grpo.memory.budget import Budget
from grpo.memory.estimate import Workload, choose_budget, estimate_memory
from grpo.memory.microbatch import score_rollout
from grpo.models.head import Readout
from grpo.models.load import LanguageModel, load_language_model
from grpo.models.padding import pad_left
from grpo.models.reference import make_reference
from grpo.objective.kl import k3
from grpo.objective.losses import clipped_surrogate
from grpo.objective.ratios import token_ratio
from grpo.objective.weights import sequence_mean
from grpo.rollout import NativeEngine
from grpo.training.loss import KLTerm, Objective, UpdateInputs
from grpo.training.optimizer import SCHEDULES, Optimizer
from grpo.training.update import update_policy
from grpo.types import Example, Prompt, Rollout, Sampling

ROWS = 32  # at which decoding is measured


def time_once(function: Callable[[], Any], device: Device) -> float:
    """Seconds."""
    began = time.perf_counter()
    function()
    device.synchronize()
    return time.perf_counter() - began


def time_repeats(function: Callable[[], Any], repeats: int, device: Device) -> list[float]:
    """Seconds of each run, after one to warm up."""
    return [time_once(function, device) for _ in range(repeats + 1)][1:]


def time_in_turn(
    one: Callable[[], Any], other: Callable[[], Any], repeats: int, device: Device
) -> tuple[list[float], list[float]]:
    """Seconds of each run of two, one after the other, so that both see the same machine."""
    pairs = [(time_once(one, device), time_once(other, device)) for _ in range(repeats + 1)][1:]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def load_policy(setting: Setting, work: Path) -> LanguageModel:
    device = open_device(setting.device, setting.precision)
    return load_language_model(work / "model", device)


def read_prompts(policy: LanguageModel, setting: Setting, work: Path, count: int) -> list[Prompt]:
    example = Example("", "", float)
    chats = json.loads((work / "prompts.json").read_text())[:count]
    texts = [
        policy.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for chat in chats
    ]
    return [Prompt(text, tuple(policy.tokenizer.encode(text)), example) for text in texts]


def measure_rollout(setting: Setting, work: Path) -> dict[str, Any]:
    """Tokens a second of the native engine and of transformers' generate, on the same prompts."""
    policy = load_policy(setting, work)
    group = ROWS // setting.prompts
    prompts = read_prompts(policy, setting, work, setting.prompts)
    engine = NativeEngine(policy, setting.tokens, Budget.from_tokens(10**7))
    sampling = Sampling(setting.temperature)
    prompts_BP, lengths_B = pad_left(
        [prompt.token_ids for prompt in prompts], policy.pad_id, policy.device.torch_device
    )
    columns_P = torch.arange(prompts_BP.shape[1], device=prompts_BP.device)
    mask_BP = (columns_P >= prompts_BP.shape[1] - lengths_B[:, None]).long()
    config = GenerationConfig(
        max_new_tokens=setting.tokens, do_sample=True, temperature=setting.temperature,
        top_k=0, num_return_sequences=group, eos_token_id=list(policy.end_ids),
        pad_token_id=policy.pad_id,
    )  # fmt: skip

    @torch.no_grad()
    def generate() -> None:
        with policy.device.autocast():
            policy.model.generate(
                input_ids=prompts_BP, attention_mask=mask_BP, generation_config=config
            )

    engine_seconds, generate_seconds = time_in_turn(
        lambda: engine.generate(prompts, group, sampling, 0), generate, 3, policy.device
    )
    tokens = ROWS * setting.tokens
    return {
        "rows": ROWS,
        "tokens": setting.tokens,
        "ours_tokens_per_second": tokens / median(engine_seconds),
        "generate_tokens_per_second": tokens / median(generate_seconds),
        "speedup": median(generate_seconds) / median(engine_seconds),
        "seconds": {"ours": engine_seconds, "generate": generate_seconds},
    }


def count_operations(policy: LanguageModel, lengths: list[int], group: int, tokens: int) -> float:
    """Multiplications and additions of one forward pass that computes each token once.

    A completion's last token is predicted and not read; its first is predicted by the prompt.
    """
    config = policy.model.config.get_text_config()
    layers = sum(
        module.weight.numel()
        for name, module in policy.model.base_model.named_modules()
        if isinstance(module, torch.nn.Linear)
    )
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    read = sum(lengths) + len(lengths) * group * (tokens - 1)
    pairs = sum(
        length * (length + 1) / 2 + group * ((tokens - 1) * length + (tokens - 1) * tokens / 2)
        for length in lengths
    )
    predicted = len(lengths) * group * tokens
    head = policy.head.vocabulary * config.hidden_size
    return 2.0 * (layers * read + head * predicted + 2 * width * config.num_hidden_layers * pairs)


def measure_matrix_rate(device: Device) -> float:
    """Operations a second of the best large square matrix product."""
    best = 0.0
    for size in (1024, 2048, 4096):
        a = torch.randn(size, size, device=device.torch_device)
        b = torch.randn(size, size, device=device.torch_device)

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b) -> None:
            with device.autocast():
                torch.mm(a, b)

        best = max(best, 2.0 * size**3 / min(time_repeats(multiply, 5, device)))
    return best


@dataclass
class Update:
    """An optimizer step on completions that nobody wrote, with all that a run's has."""

    policy: LanguageModel
    setting: Setting
    prompts: list[Prompt]

    def __post_init__(self) -> None:
        setting, policy = self.setting, self.policy
        count, width = setting.prompts * setting.group, setting.tokens
        generator, device = torch.Generator().manual_seed(0), policy.device.torch_device
        self.written = Rollout(
            prompts=tuple(self.prompts),
            tokens_NC=torch.randint(5, 300, (count, width), generator=generator).to(device),
            logprobs_NC=torch.full((count, width), -1.0, device=device),
            lengths_N=torch.full((count,), width, device=device),
            truncated_N=torch.zeros(count, dtype=torch.bool, device=device),
            texts=("",) * count,
        )
        self.advantages_N = torch.randn(count, generator=generator).to(device)
        term = KLTerm(k3, None, in_reward=False, unbiased_gradient=False)
        self.reference = make_reference(policy, moves=False) if setting.kl_weight else None
        self.objective = Objective(
            token_ratio, clipped_surrogate, sequence_mean, term if self.reference else None,
            Sampling(setting.temperature), width,
        )  # fmt: skip
        self.optimizer = Optimizer(
            policy.model, "adamw", 1e-6, 1, SCHEDULES["constant"], 0, 0.0, (0.9, 0.99), 1.0
        )
        longest = max(len(p.token_ids) for p in self.prompts)
        workload = Workload(
            longest, width, setting.group, "adamw", self.reference is not None, False
        )
        held = estimate_memory(policy, workload)
        self.limit = choose_budget(device, None, None, None, held, workload.longest).forward_limit
        self.reference_NC = self.refer()

    def refer(self) -> torch.Tensor | None:
        if self.reference is None:
            return None
        readout = Readout(self.objective.sampling)
        return score_rollout(self.reference.model, self.written, readout, self.limit).plain_logprobs

    def step(self) -> None:
        learned = UpdateInputs(self.advantages_N, None, self.reference_NC, self.setting.kl_weight)
        update_policy(
            self.policy, self.reference, self.optimizer, self.objective, self.written, learned,
            self.limit,
        )  # fmt: skip


def measure_update(setting: Setting, work: Path) -> dict[str, Any]:
    """Seconds of an optimizer step, and the share of the matrix rate on useful operations.

    Useful: each prompt once a group, each completion token once, forward, and twice that backward;
    what is computed again to save memory doesn't count.
    """
    policy = load_policy(setting, work)
    prompts = read_prompts(policy, setting, work, setting.prompts)
    update = Update(policy, setting, prompts)
    reference_seconds = time_repeats(update.refer, 3, policy.device) if update.reference else []
    seconds = time_repeats(update.step, 4, policy.device)
    lengths = [len(prompt.token_ids) for prompt in prompts]
    forward = count_operations(policy, lengths, setting.group, setting.tokens)
    rate = measure_matrix_rate(policy.device)
    return {
        "seconds": seconds,
        "reference_seconds": reference_seconds,
        "useful_gflop": 3 * forward / 1e9,
        "matrix_gflops": rate / 1e9,
        "update_share_of_matrix_rate": 3 * forward / median(seconds[1:]) / rate,
        "reference_share_of_matrix_rate": (
            forward / median(reference_seconds) / rate if reference_seconds else None
        ),
        "peak_gb": policy.device.measure_peak_gb(),
    }


def measure_lengths(setting: Setting, work: Path) -> dict[str, Any]:
    """Seconds of rollout and update at half, once and twice the completion tokens."""
    policy = load_policy(setting, work)
    prompts = read_prompts(policy, setting, work, setting.prompts)
    by_length = []
    for tokens in (setting.tokens // 2, setting.tokens, setting.tokens * 2):
        update = Update(policy, replace(setting, tokens=tokens), prompts)
        engine = NativeEngine(policy, tokens, Budget.from_tokens(10**7))
        sampling = Sampling(setting.temperature)

        def sample(engine: NativeEngine = engine, sampling: Sampling = sampling) -> None:
            engine.generate(prompts, setting.group, sampling, 0)

        total = tokens * setting.group * setting.prompts
        rollout_seconds = median(time_repeats(sample, 3, policy.device))
        update_seconds = median(time_repeats(update.step, 3, policy.device))
        by_length.append(
            {
                "completion_tokens": total,
                "rollout_seconds": rollout_seconds,
                "update_seconds": update_seconds,
                "milliseconds_a_token": 1e3 * (rollout_seconds + update_seconds) / total,
                "peak_gb": policy.device.measure_peak_gb(),
            }
        )
    return {"by_length": by_length}


def measure_roofline(setting: Setting, work: Path) -> dict[str, Any]:
    """What the machine can do: matrix products by rows, as plain and as laid out, and copying."""
    from grpo.models.cpu.linear import computed_as, make_packed_forwards

    policy = load_policy(setting, work)
    device, linear = policy.device, policy.head.linear
    body = next(m for m in policy.model.base_model.modules() if isinstance(m, torch.nn.Linear))
    figures: dict[str, Any] = {"matrix_gflops": measure_matrix_rate(device) / 1e9, "products": []}
    for layer in (body, linear):
        for rows in (1, 8, 16, 32, 64, 256):
            x = torch.randn(1, rows, layer.weight.shape[1], device=device.torch_device)
            work_done = 2.0 * rows * layer.weight.numel() / 1e9
            with torch.no_grad(), device.autocast():
                plain = min(time_repeats(lambda x=x, layer=layer: layer(x), 20, device))
                with computed_as(make_packed_forwards(rows, [layer])):
                    packed = min(time_repeats(lambda x=x, layer=layer: layer(x), 20, device))
            shape = "x".join(map(str, layer.weight.shape))
            rates = {"plain": work_done / plain, "laid_out": work_done / packed}
            figures["products"].append({"weight": shape, "rows": rows, **rates})
    source = torch.randn(2**26, device=device.torch_device)
    target = torch.empty_like(source)
    seconds = min(time_repeats(lambda: target.copy_(source), 5, device))
    figures["copy_gb_per_second"] = 2 * source.numel() * 4 / seconds / 1e9
    return figures


PARTS = {
    "rollout": measure_rollout,
    "update": measure_update,
    "lengths": measure_lengths,
    "roofline": measure_roofline,
}


if __name__ == "__main__":
    part, work, name, out = sys.argv[1:]
    Path(out).write_text(json.dumps(PARTS[part](SETTINGS[name], Path(work))))
