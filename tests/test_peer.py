"""The same losses and advantages as TRL's own code gives, on the same random numbers.

TRL's loss is run as it is, with a stand-in for the model's forward pass alone; its advantages come
out of a real trainer. Where a definition differs on purpose, the test says how.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from torch import Tensor
from torch.testing import assert_close

from grpo.build.objective import build_advantage, build_objective
from grpo.config import schema
from grpo.models.files import PACKAGE_FOLDER
from grpo.models.forward import Completions
from grpo.models.head import TokenScores
from grpo.training.loss import Minibatch, OldPolicy, UpdateInputs, compute_loss
from grpo.types import Example, Prompt, Rollout

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install grpo-bench[bench]")

N, C, GROUP = 12, 9, 4
LENGTHS = torch.tensor([9, 1, 4, 9, 2, 7, 3, 9, 5, 6, 8, 1])
TRUNCATED = torch.tensor([1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0]).bool()


def compose_config(*overrides: str) -> Any:
    GlobalHydra.instance().clear()
    schema.register_schema()
    with initialize_config_dir(str(schema.find_conf_folder()), version_base="1.3"):
        return compose("config", [f"max_new_tokens={C}", *overrides])


def draw_step(seed: int, spread: float) -> dict[str, Tensor]:
    """Log-probabilities of three policies, in float64; `spread` is how far the policy has moved."""
    generator = torch.Generator().manual_seed(seed)

    def draw_normal() -> Tensor:
        return torch.randn(N, C, generator=generator, dtype=torch.float64)

    old = -draw_normal().abs() - 0.1
    mask = torch.arange(C) < LENGTHS[:, None]
    return {
        "old": old * mask,
        "new": (old + spread * draw_normal()) * mask,
        "reference": (old + 0.3 * draw_normal()) * mask,
        "entropy": draw_normal().abs() * mask,
        "advantages": torch.randn(N, generator=generator, dtype=torch.float64),
        "mask": mask,
    }


def our_loss(cfg: Any, step: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss of one minibatch that holds everything, and its gradient by log-probability."""
    from grpo.objective import Tokens, top_entropy_mask

    objective = build_objective(cfg)
    example = Example("q", "a", float)
    rollout = Rollout(
        prompts=(Prompt("q", (1,), example),) * (N // GROUP),
        tokens_NC=torch.zeros(N, C, dtype=torch.int64),
        logprobs_NC=step["old"],
        lengths_N=LENGTHS,
        truncated_N=TRUNCATED,
        texts=("",) * N,
    )
    new = step["new"].clone().requires_grad_()
    trained = step["mask"] & ~TRUNCATED[:, None] if objective.mask_truncated else step["mask"]
    minibatch = Minibatch(
        prompts=list(range(N // GROUP)),
        weights_NC=objective.averaging(Tokens(trained, torch.zeros(N, dtype=torch.int64), C)),
        policy_factor_NC=top_entropy_mask(step["entropy"], trained, objective.top_entropy),
    )
    inputs = Completions(torch.ones(3, 1).long(), torch.ones(3), rollout.tokens_NC, step["mask"])
    nothing = torch.zeros_like(new)
    scored = TokenScores(new, new, step["entropy"], nothing, nothing)
    learned = UpdateInputs(
        step["advantages"], OldPolicy(step["old"]), step["reference"], cfg.kl_weight
    )
    loss = compute_loss(objective, rollout, learned, minibatch, torch.arange(N), inputs, scored)
    loss.total.backward()
    assert new.grad is not None
    return loss.total.detach(), new.grad


def their_loss(step: dict[str, Tensor], **settings: Any) -> tuple[Tensor, Tensor]:
    """What TRL's `_compute_loss` gives for the same numbers."""
    from accelerate import Accelerator
    from trl.trainer.grpo_trainer import GRPOTrainer

    new = step["new"].clone().requires_grad_()
    arguments = trl.GRPOConfig(output_dir="unused", report_to="none", use_cpu=True)
    arguments.use_bias_correction_kl = settings.pop("use_bias_correction_kl", False)
    arguments.delta = settings.pop("delta", None)
    trainer = SimpleNamespace(
        args=arguments,
        accelerator=Accelerator(cpu=True),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        off_policy_mask_threshold=None,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=C,
        _entropy_bonus_enabled=settings.get("entropy_coef", 0) > 0,
        use_adaptive_entropy=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *a, **k: (new, step["entropy"], None),
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        **{
            "beta": 0.1, "epsilon_low": 0.2, "epsilon_high": 0.2, "top_entropy_quantile": 1.0,
            "importance_sampling_level": "token", "loss_type": "grpo", **settings,
        },
    )  # fmt: skip
    trainer.get_high_entropy_mask = lambda *a: GRPOTrainer.get_high_entropy_mask(trainer, *a)
    arguments.steps_per_generation = 1
    mask = step["mask"] & ~TRUNCATED[:, None] if settings.get("mask_truncated") else step["mask"]
    inputs = {
        "prompt_ids": torch.zeros(N, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(N, 1, dtype=torch.int64),
        "completion_ids": torch.zeros(N, C, dtype=torch.int64),
        "completion_mask": mask.long(),
        "advantages": step["advantages"],
        "old_per_token_logps": step["old"],
        "ref_per_token_logps": step["reference"],
        "num_items_in_batch": mask.sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    assert new.grad is not None
    return loss.detach(), new.grad


CLIP = ("algorithm.policy_loss.clip_high=0.28", {"epsilon_high": 0.28})
SEQUENCE = {"importance_sampling_level": "sequence"}
GSPO = {**SEQUENCE, "epsilon_low": 3e-4, "epsilon_high": 4e-4}
LUSPO = {**SEQUENCE, "epsilon_low": 2e-3, "epsilon_high": 2.5e-3}
LOSSES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "grpo": (["algorithm=grpo"], {}),
    "grpo, clip higher": (["algorithm=grpo", CLIP[0]], CLIP[1]),
    "grpo, dual clip": (["algorithm=grpo", "algorithm.policy_loss.clip_dual=1.5"], {"delta": 1.5}),
    "bnpo": (["algorithm=bnpo"], {"loss_type": "bnpo"}),
    "dr_grpo": (["algorithm=dr_grpo"], {"loss_type": "dr_grpo"}),
    "dapo": (["algorithm=dapo"], {"loss_type": "dapo", **CLIP[1]}),
    "cispo": (["algorithm=cispo"], {"loss_type": "cispo", "epsilon_high": 5.0}),
    "sapo": (["algorithm=sapo"], {"loss_type": "sapo"}),
    "vespo": (["algorithm=vespo"], {"loss_type": "vespo"}),
    "gspo": (["algorithm=gspo"], GSPO),
    "luspo": (["algorithm=luspo"], {"loss_type": "luspo", **LUSPO}),
    "truncated masked": (
        ["algorithm=grpo", "algorithm.mask_truncated=true"], {"mask_truncated": True}
    ),
    "truncated masked, by token": (
        ["algorithm=dapo", "algorithm.mask_truncated=true"],
        {"loss_type": "dapo", "mask_truncated": True, **CLIP[1]},
    ),
    "uncertain tokens": (
        ["algorithm=dapo", "algorithm.top_entropy=0.2"],
        {"loss_type": "dapo", "top_entropy_quantile": 0.2, **CLIP[1]},
    ),
    "unbiased kl": (
        ["algorithm=grpo", "kl.unbiased_gradient=true"], {"use_bias_correction_kl": True}
    ),
    # TRL's bonus is a mean over tokens whatever the loss; ours is averaged as the loss is, so that
    # it adds up over micro-batches: the same where that is a mean over tokens too.
    "entropy bonus": (
        ["algorithm=bnpo", "algorithm.entropy_weight=0.01"],
        {"loss_type": "bnpo", "entropy_coef": 0.01},
    ),
}  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("spread", [0.0, 0.02, 0.6], ids=["on-policy", "near", "far"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_trls(name: str, spread: float, seed: int) -> None:
    overrides, settings = LOSSES[name]
    step = draw_step(seed, spread)
    loss, gradient = our_loss(compose_config(*overrides, "kl_weight=0.1"), step)
    trl_loss, trl_gradient = their_loss(step, **dict(settings))
    assert_close(loss, trl_loss, rtol=1e-5, atol=1e-9)
    assert float((gradient - trl_gradient).abs().max()) <= 1e-5 * float(trl_gradient.abs().max())


def test_rloos_loss_is_trls() -> None:
    """TRL's own RLOO trainer, whose KL is in the reward."""
    from trl.trainer.rloo_trainer import RLOOTrainer

    step = draw_step(0, 0.02)
    cfg = compose_config("algorithm=rloo", "kl=none")
    loss, gradient = our_loss(cfg, step)
    new = step["new"].clone().requires_grad_()
    from accelerate import Accelerator

    trainer = SimpleNamespace(
        accelerator=Accelerator(cpu=True), model=SimpleNamespace(training=True),
        aux_loss_enabled=False, epsilon_low=0.2, epsilon_high=0.2,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *a, **k: (new, step["entropy"], None),
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(N, 1).long(), "prompt_mask": torch.ones(N, 1).long(),
        "completion_ids": torch.zeros(N, C).long(), "completion_mask": step["mask"].long(),
        "advantages": step["advantages"], "old_logps": step["old"].sum(1),
    }  # fmt: skip
    trl_loss = RLOOTrainer._compute_loss(trainer, None, inputs)
    trl_loss.backward()
    assert_close(loss, trl_loss.detach(), rtol=1e-5, atol=1e-9)
    assert_close(gradient, new.grad, rtol=1e-5, atol=1e-9)


REWARDS = [[1.0, 0.0, 0.5, 2.0], [3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 1.0, 0.0], [0.2, 0.1, 0.4, 0.3]]
FORMATS = [[0.0, 1.0, 1.0, None], [1.0, 1.0, 0.0, 1.0], [None, 1.0, 0.0, 0.0], [0.5, None, 0, 0.1]]
ADVANTAGES = {
    "group": (["algorithm=grpo"], {"scale_rewards": "group"}),
    "batch": (["algorithm=grpo", "algorithm.scale=batch_std"], {"scale_rewards": "batch"}),
    "none": (["algorithm=dr_grpo"], {"scale_rewards": "none"}),
    "GDPO": (
        ["algorithm=grpo", "algorithm.aggregate=normalize_then_sum"],
        {"multi_objective_aggregation": "normalize_then_sum"},
    ),
    "RLOO": (["algorithm=rloo"], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_are_trls(name: str, tmp_path: Path) -> None:
    """Two rewards, one of which doesn't apply everywhere, out of a real trainer's step."""
    overrides, settings = ADVANTAGES[name]
    trl_advantages = train_for_advantages("RLOO" if name == "RLOO" else "GRPO", settings, tmp_path)
    parts_RBG = torch.tensor(
        [[[float("nan") if v is None else v for v in row] for row in p] for p in (REWARDS, FORMATS)]
    )
    advantages = build_advantage(compose_config(*overrides))(parts_RBG, torch.tensor([1.0, 0.5]))
    assert_close(advantages.flatten(), trl_advantages, rtol=1e-5, atol=1e-6)


def train_for_advantages(kind: str, settings: dict[str, Any], folder: Path) -> Tensor:
    """The advantages of a real trainer's first step, in the order of REWARDS."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def make_reward(table: list[list[float | None]]) -> Any:
        def reward(prompts: list[str], **columns: Any) -> list[float | None]:
            counts: dict[str, int] = defaultdict(int)
            rewards = []
            for prompt in prompts:
                number = int(prompt)
                rewards.append(table[number][counts[prompt]])
                counts[prompt] += 1
            return rewards

        return reward

    options = trl.GRPOConfig if kind == "GRPO" else trl.RLOOConfig
    trainer_class = trl.GRPOTrainer if kind == "GRPO" else trl.RLOOTrainer
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(PACKAGE_FOLDER / "tiny", dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(PACKAGE_FOLDER / "tiny"),
        reward_funcs=[make_reward(REWARDS), make_reward(FORMATS)],
        train_dataset=Dataset.from_dict({"prompt": ["0", "1", "2", "3"]}),
        args=options(
            output_dir=str(folder), report_to="none", use_cpu=True, max_steps=1, beta=0.0,
            per_device_train_batch_size=16, num_generations=4, max_completion_length=3,
            reward_weights=[1.0, 0.5], save_strategy="no", disable_tqdm=True, bf16=False,
            **settings,
        ),
    )  # fmt: skip
    trainer.train()
    prompts, advantages = list(trainer._logs["prompt"]), list(trainer._logs["advantages"])
    order = sorted(range(16), key=lambda n: (int(prompts[n]), n))
    return torch.tensor([advantages[n] for n in order])
