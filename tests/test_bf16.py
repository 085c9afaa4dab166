"""Tests training in bf16 on a CPU, by the branches that a GPU takes and by the CPU's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo.device import multiplies_bf16, open_device
from grpo.memory.budget import Budget
from grpo.memory.microbatch import score_rollout
from grpo.models.files import find_model_folder
from grpo.models.load import LanguageModel, load_language_model
from grpo.models.reference import Reference, make_reference
from grpo.objective import RATIOS, clipped_surrogate
from grpo.objective.kl import k3
from grpo.objective.ratios import Ratio
from grpo.objective.weights import sequence_mean
from grpo.rollout import NativeEngine
from grpo.training import loop as train
from grpo.training.loss import KLTerm, Objective, UpdateInputs
from grpo.training.optimizer import SCHEDULES, Optimizer
from grpo.training.update import update_policy
from grpo.types import Example, Prompt, Rollout, Sample, Sampling
from tests.conftest import read_lines, read_metrics
from tests.test_algorithms import combine_choices

ROOT = Path(__file__).resolve().parents[1]
Grpo = Callable[..., tuple[int, str]]
BF16 = ("device=cpu", "device.precision=bf16", "tracking=none", "hydra.run.dir=run")
SHORT = (
    "batch_size=2", "num_generation=4", "max_new_tokens=24", "max_steps=2", "eval.every=0",
    "eval.samples=1", "dataset.size=20", "dataset.eval_size=1", "checkpoint.every=0",
)  # fmt: skip


@pytest.fixture(params=["gpu", "cpu"])
def branches(request: pytest.FixtureRequest) -> None:
    """A GPU's branches, and those of a CPU with instructions for bf16."""
    if request.param == "gpu":
        request.getfixturevalue("gpu_branches")
    elif not multiplies_bf16():
        pytest.skip("this processor has no instructions for bf16")


def read_steps(folder: Path) -> list[dict[str, Any]]:
    steps = read_lines(folder / "run/metrics.jsonl")[1:]
    for step in steps:
        assert all(isinstance(v, float | int) and math.isfinite(v) for v in step.values())
    return steps


@pytest.mark.usefixtures("gpu_branches")
@pytest.mark.parametrize(("algorithm", "kl", "adapter"), combine_choices())
def test_each_combination_is_on_policy(
    algorithm: str, kl: str, adapter: str, grpo: Grpo, tmp_path: Path
) -> None:
    """With one update a step every ratio is exactly 1, and the first KL is 0."""
    code, printed = grpo(
        f"algorithm={algorithm}", f"kl={kl}", f"adapter={adapter}", *BF16, *SHORT,
        "learning_rate=1e-3",
    )  # fmt: skip
    assert code == 0, printed
    steps = read_steps(tmp_path)
    for step in steps:
        assert step["policy/ratio_max"] == 1.0
        assert step["policy/clip_fraction"] == 0.0
        assert abs(step["sampler/kl"]) < 1e-3
    assert abs(steps[0].get("kl/k3", 0.0)) < 1e-9
    assert max(step["optim/grad_norm"] for step in steps) > 0


@pytest.mark.usefixtures("gpu_branches")
@pytest.mark.parametrize("engine", ["native", "hf"])
@pytest.mark.parametrize("algorithm", ["grpo", "gspo"])
def test_several_updates_start_from_the_policy_that_is_updated(
    algorithm: str, engine: str, grpo: Grpo, tmp_path: Path
) -> None:
    """At a learning rate that changes nothing, ratios are 1 up to the rounding of micro-batches."""
    code, printed = grpo(
        f"algorithm={algorithm}", f"rollout={engine}", *BF16, *SHORT, "learning_rate=1e-30",
        "algorithm.num_iterations=2", "algorithm.minibatches=2",
    )  # fmt: skip
    assert code == 0, printed
    for step in read_steps(tmp_path):
        assert step["policy/ratio_max"] == pytest.approx(1.0, abs=1e-4)
        assert step["policy/clip_fraction"] == 0.0


class NoFloat64(TorchDispatchMode):
    """Refuses all operations that make a float64, which MPS doesn't support."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            assert getattr(tensor, "dtype", None) != torch.float64, function
        return output


@pytest.mark.usefixtures("gpu_branches")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "overrides",
    [
        ("kl=full", "algorithm.minibatches=2", "algorithm.entropy_weight=0.1"),
        ("algorithm=gpg", "kl.within=reward", "sampling.top_p=0.9", "adapter=lora"),
        ("algorithm=bnpo", "algorithm.top_entropy=0.5", "optim.schedule=cosine"),
    ],
    ids=" ".join,
)
def test_a_step_makes_no_float64(
    overrides: tuple[str, ...], precision: str, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, seen = train.train_step, []

    def take_step(*arguments: Any) -> dict[str, float]:
        seen.append(1)
        with NoFloat64():
            return step(*arguments)

    monkeypatch.setattr(train, "train_step", take_step)
    code, printed = grpo(*BF16, *SHORT, f"device.precision={precision}", *overrides)
    assert code == 0, printed
    assert len(seen) == 2


@pytest.mark.parametrize("engine", ["native", "hf"])
def test_a_cpu_of_its_own_branches_trains(engine: str, grpo: Grpo, tmp_path: Path) -> None:
    """Trains with the products and kernels that this CPU uses."""
    code, printed = grpo(f"rollout={engine}", *BF16, *SHORT, "learning_rate=1e-3")
    assert code == 0, printed
    steps = read_steps(tmp_path)
    for step in steps:
        assert step["policy/ratio_max"] == 1.0
        assert step["policy/clip_fraction"] == 0.0
        assert abs(step["sampler/kl"]) < 1e-3
    assert max(step["optim/grad_norm"] for step in steps) > 0


@pytest.mark.usefixtures("branches")
def test_resumed_it_gives_the_same_numbers(grpo: Grpo, tmp_path: Path) -> None:
    """Four steps at once give the same bits as two and then two more."""
    job = [
        "device=cpu", "device.precision=bf16", "tracking=none", *SHORT, "eval.every=2",
        "learning_rate=1e-3", "kl_weight=0.1", "algorithm.minibatches=2",
    ]  # fmt: skip
    for arguments in (
        [*job, "max_steps=4", "hydra.run.dir=whole"],
        [*job, "max_steps=2", "hydra.run.dir=parts"],
        ["resume=parts", "max_steps=4"],
    ):
        code, printed = grpo(*arguments)
        assert code == 0, printed
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert [step["step"] for step in read_metrics(whole)] == [0, 1, 2, 3, 4]
    assert read_metrics(whole) == read_metrics(parts)
    files = [run / "checkpoints/latest/model/model.safetensors" for run in (whole, parts)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """Returns SmolLM2-135M's folder, from the hub's cache or the wheel."""
    config = OmegaConf.load(ROOT / "conf/model/smollm2_135m.yaml")
    return find_model_folder(
        config.name, config.id, None, None, OmegaConf.to_container(config.wheel)
    )


class KeepsGradient(Optimizer):
    """Keeps the gradient of its step, concatenated, in fp32 on the CPU."""

    gradient: Tensor

    def step(self) -> dict[str, float]:
        self.gradient = torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])
        return super().step()


def shake(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(0.01 * float(weight.abs().mean()) * noise)


def build_prompts(policy: LanguageModel) -> list[Prompt]:
    def encode(question: str) -> tuple[int, ...]:
        message = [{"role": "user", "content": question}]
        encoded = policy.tokenizer.apply_chat_template(message, add_generation_prompt=True)
        return tuple(encoded["input_ids"])

    questions = ("What is 47 + 38?", "Name three rivers of France.")
    return [Prompt(q, encode(q), Example(q, "", float)) for q in questions]


def compute_gradient(
    policy: LanguageModel, reference: Reference, rollout: Rollout, ratio: Ratio
) -> tuple[Tensor, dict[str, float]]:
    """Returns a step's gradient, with random advantages and a KL to a different reference.

    The rollout counts as the policy's, so that no token is weighted by its probability in another
    precision.
    """
    limit, sampling = Budget.from_tokens(2048).forward_limit, Sampling(1.0)
    term = KLTerm(k3, None, in_reward=False, unbiased_gradient=False)
    objective = Objective(ratio, clipped_surrogate, sequence_mean, term, sampling, 24)
    of_policy = score_rollout(policy, rollout, objective.readout, limit)
    of_reference = score_rollout(reference.model, rollout, objective.readout, limit)
    optimizer = KeepsGradient(
        policy.model, "adamw", 0.0, 1, SCHEDULES["constant"], 0, 0.0, (0.9, 0.99), 0.0
    )
    advantages_N = torch.randn(len(rollout.texts), generator=torch.Generator().manual_seed(3))
    learned = UpdateInputs(advantages_N, None, of_reference.plain_logprobs, 0.1)
    rescored = replace(rollout, logprobs_NC=of_policy.logprobs)
    updated = update_policy(policy, reference, optimizer, objective, rescored, learned, limit)
    return optimizer.gradient.double(), updated.metrics


@pytest.mark.slow
@pytest.mark.usefixtures("branches")
def test_the_gradient_is_that_of_fp32(smollm2: Path) -> None:
    found: dict[str, Tensor] = {}
    rollout: Rollout | None = None
    for precision in ("fp32", "bf16"):
        policy = load_language_model(smollm2, open_device("cpu", precision))
        reference = make_reference(policy, moves=False)
        shake(policy.model)
        if rollout is None:
            engine = NativeEngine(policy, 24, Budget.from_tokens(2048))
            rollout = engine.generate(build_prompts(policy), 4, Sampling(1.0), seed=2)
        for name in ("token", "sequence"):
            gradient, stats = compute_gradient(policy, reference, rollout, RATIOS[name])
            assert stats["policy/ratio_max"] == 1.0
            assert stats["kl/k3"] > 1e-3
            if precision == "fp32":
                found[name] = gradient
                continue
            cosine = torch.nn.functional.cosine_similarity(gradient, found[name], dim=0)
            assert float(cosine) >= 0.999
            assert float(gradient.norm()) == pytest.approx(float(found[name].norm()), rel=0.02)


def reward_vowels(samples: Sequence[Sample]) -> list[float]:
    """Returns rewards that differ between completions."""
    return [sum(x in "aeiou" for x in s.completion) / (1 + len(s.completion)) for s in samples]


@pytest.mark.slow
@pytest.mark.usefixtures("gpu_branches")
@pytest.mark.parametrize("minibatches", [1, 2])
def test_gspo_is_on_policy_with_a_real_model(
    minibatches: int, grpo: Grpo, smollm2: Path, tmp_path: Path
) -> None:
    """GSPO's clip is so narrow that a sampler's rounding alone would clip most of a rollout.

    With several updates, the learning rate is one that changes nothing.
    """
    code, printed = grpo(
        "model=local", f"model.path={smollm2}", "algorithm=gspo", "rollout=native", *BF16, *SHORT,
        f"algorithm.minibatches={minibatches}",
        f"learning_rate={1e-5 if minibatches == 1 else 1e-30}",
        "~reward.answer", "+reward.vowels._target_=tests.test_bf16.reward_vowels",
        "+reward.vowels.weight=1.0",
    )  # fmt: skip
    assert code == 0, printed
    for step in read_steps(tmp_path):
        assert step["policy/ratio_max"] == 1.0
        assert step["policy/clip_fraction"] == 0.0
        assert step["optim/grad_norm"] > 0
        assert step["sampler/importance_max"] > 1.01  # the sampler rounds differently
