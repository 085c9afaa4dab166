"""The same gradients as TRL's own trainer has, at every optimizer step that a rollout is worth.

A real `GRPOTrainer` generates once and takes several optimizer steps from it, with accumulation and
a reference. The whole of `update_policy` takes the same rows from the same weights, in
micro-batches of its own.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.build.objective import build_advantage, build_objective
from grpo.memory.budget import Budget
from grpo.memory.microbatch import score_rollout, split_into_micro_batches
from grpo.models.files import PACKAGE_FOLDER
from grpo.models.load import LanguageModel
from grpo.models.reference import make_reference
from grpo.training import minibatches
from grpo.training import optimizer as optim
from grpo.training.loss import UpdateInputs
from grpo.training.optimizer import SCHEDULES, Optimizer
from grpo.training.update import score_old_policy, update_policy
from grpo.types import Example, Prompt, Rollout
from tests.test_peer import compose_config

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install grpo-bench[bench]")

PROMPTS, GROUP, TOKENS, TEMPERATURE, KL_WEIGHT = 6, 4, 24, 1.2, 0.1
MINIBATCHES, ITERATIONS = 2, 2
MICRO_ROWS = 4  # of the peer
MICRO_BATCHES = PROMPTS * GROUP // MICRO_ROWS  # of the peer, a pass
# Of one length: padding on the left moves the peer's positions, whose rounding in fp32 makes up to
# 2e-4 of a gradient.
QUESTIONS = [f"What is {n} + {97 - n}?" for n in range(23, 23 + 9 * PROMPTS, 9)]

# Our overrides, and the peer's settings.
ALGORITHMS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "grpo": ([], {"loss_type": "grpo"}),
    "dr_grpo": ([], {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "dapo": (["algorithm.resample=0"], {"loss_type": "dapo", "epsilon_high": 0.28}),
    "gspo": (
        [],
        {
            "loss_type": "grpo", "importance_sampling_level": "sequence",
            "epsilon": 3e-4, "epsilon_high": 4e-4,
        },
    ),
    # Of its own, the clip is so wide that a few steps don't reach it.
    "cispo": (
        ["algorithm.policy_loss.ratio_max=1.1"], {"loss_type": "cispo", "epsilon_high": 1.1}
    ),
}  # fmt: skip


class RecordingSGD(torch.optim.SGD):
    """Plain SGD that keeps the gradients of every step, by parameter."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr)
        self.gradients: list[dict[int, Tensor]] = []

    def step(self, closure: Any = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.gradients.append({id(p): p.grad.clone() for p in parameters})
        super().step(closure)

    def name_gradients(self, model: nn.Module) -> list[dict[str, Tensor]]:
        names = {id(p): name for name, p in model.named_parameters()}
        return [{names[n]: g for n, g in step.items()} for step in self.gradients]


class Steps(NamedTuple):
    """What one side made of a rollout."""

    gradients: list[dict[str, Tensor]]  # at each optimizer step, before any clipping
    loss: float  # mean over the steps


class Rows(NamedTuple):
    """What the peer generated, in the order of QUESTIONS."""

    prompts: list[tuple[int, ...]]  # B
    tokens_NC: Tensor
    mask_NC: Tensor
    advantages_N: Tensor
    old_NC: Tensor  # the peer's log-probabilities before the first step
    minibatch_B: Tensor


def shake(model: nn.Module) -> None:
    """Moves the weights a little away from what the reference keeps."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            spread = 0.05 * float(weight.std()) if weight.numel() > 1 else 0.0
            weight.add_(spread * torch.randn(weight.shape, generator=generator))


def reward(completions: list[Any], **columns: Any) -> list[float]:
    """Some number that differs from one text to the next."""
    return [score(completion[0]["content"]) for completion in completions]


def score(text: str) -> float:
    return sum(n * ord(letter) for n, letter in enumerate(text)) % 17 / 17


def shuffle_whole_groups(rows: dict[str, Any]) -> dict[str, Any]:
    """As TRL's shuffle, but that a group stays within one optimizer step.

    Which groups make a step is drawn, and so is the order of a step's rows.
    """
    generator = torch.Generator().manual_seed(2)
    groups = torch.randperm(PROMPTS, generator=generator).view(MINIBATCHES, -1)
    rows_MS = (groups[..., None] * GROUP + torch.arange(GROUP)).flatten(1)
    order = torch.cat(
        [
            row_numbers[torch.randperm(len(row_numbers), generator=generator)]
            for row_numbers in rows_MS
        ]
    )
    whole = {"num_items_in_batch"}
    return {name: value if name in whole else value[order] for name, value in rows.items()}


def train_peer(
    settings: dict[str, Any], rate: float, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Rows, Steps]:
    """All optimizer steps of one rollout of a real trainer's."""
    from datasets import Dataset
    from trl.trainer import grpo_trainer

    monkeypatch.setattr(grpo_trainer, "shuffle_sequence_dict", shuffle_whole_groups)
    seen: list[dict[str, Any]] = []
    losses: list[float] = []

    class Trainer(trl.GRPOTrainer):
        """As it is, but that each micro-batch and its loss are kept."""

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
            loss = super()._compute_loss(model, inputs)
            seen.append(inputs)
            losses.append(float(loss.detach()))
            return loss

    model = AutoModelForCausalLM.from_pretrained(PACKAGE_FOLDER / "tiny", dtype=torch.float32)
    shake(model)  # the trainer loads its reference from the folder
    optimizer = RecordingSGD(model.parameters(), lr=rate)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    trainer = Trainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(PACKAGE_FOLDER / "tiny"),
        reward_funcs=[reward],
        train_dataset=Dataset.from_dict({"prompt": chats}),
        optimizers=(optimizer, constant),
        args=trl.GRPOConfig(
            output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
            save_strategy="no", shuffle_dataset=False, gradient_checkpointing=False,
            max_steps=MINIBATCHES * ITERATIONS, per_device_train_batch_size=MICRO_ROWS,
            gradient_accumulation_steps=MICRO_BATCHES // MINIBATCHES,
            steps_per_generation=MICRO_BATCHES, num_iterations=ITERATIONS, num_generations=GROUP,
            max_completion_length=TOKENS, temperature=TEMPERATURE, beta=KL_WEIGHT,
            max_grad_norm=0.0, use_bias_correction_kl=False, **settings,
        ),
    )  # fmt: skip
    trainer.train()
    assert len(seen) == MICRO_BATCHES * ITERATIONS
    assert all(seen[n] is seen[n % MICRO_BATCHES] for n in range(len(seen)))  # generated once
    loss = sum(losses) / (MINIBATCHES * ITERATIONS)
    return group_rows(seen[:MICRO_BATCHES]), Steps(optimizer.name_gradients(model), loss)


def group_rows(micro: list[dict[str, Any]]) -> Rows:
    """A generation's micro-batches as groups, in the order of QUESTIONS."""
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE_FOLDER / "tiny")
    prompt_ids = [
        tuple(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True
            )["input_ids"]
        )
        for question in QUESTIONS
    ]
    names = ("completion_ids", "completion_mask", "advantages", "old_per_token_logps")
    rows: list[list[Any]] = []
    for number, batch in enumerate(micro):
        step = number // (MICRO_BATCHES // MINIBATCHES)
        for row in range(MICRO_ROWS):
            prompt = tuple(batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist())
            rows.append([prompt_ids.index(prompt), step, *(batch[name][row] for name in names)])
    rows.sort(key=lambda row: row[0])
    prompt_numbers, steps = (
        torch.tensor([row[0] for row in rows]),
        torch.tensor([row[1] for row in rows]),
    )
    assert prompt_numbers.view(PROMPTS, GROUP).eq(torch.arange(PROMPTS)[:, None]).all()
    minibatch_BG = steps.view(PROMPTS, GROUP)
    assert minibatch_BG.eq(minibatch_BG[:, :1]).all()  # groups are whole
    tokens_NC, mask_NC, advantages_N, old_NC = (
        torch.stack([row[n] for row in rows]) for n in range(2, 6)
    )
    return Rows(prompt_ids, tokens_NC, mask_NC.bool(), advantages_N, old_NC, minibatch_BG[:, 0])


def train_ours(
    overrides: list[str],
    rate: float,
    rows: Rows,
    policy: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[dict[str, float], Steps]:
    """The whole update of these rows, in micro-batches of its own."""
    cfg = compose_config(
        *overrides, "kl=k3", f"kl_weight={KL_WEIGHT}", f"max_new_tokens={TOKENS}",
        f"temperature={TEMPERATURE}", f"algorithm.minibatches={MINIBATCHES}",
        f"algorithm.num_iterations={ITERATIONS}",
    )  # fmt: skip
    objective, limit = build_objective(cfg), Budget.from_tokens(100).forward_limit
    reference = make_reference(policy, moves=False)
    shake(policy.model)
    texts = tuple(
        policy.tokenizer.decode(tokens[mask], skip_special_tokens=True)
        for tokens, mask in zip(rows.tokens_NC, rows.mask_NC, strict=True)
    )
    unread = Rollout(
        prompts=tuple(Prompt("", ids, Example("", "", float)) for ids in rows.prompts),
        tokens_NC=rows.tokens_NC,
        logprobs_NC=torch.zeros(rows.mask_NC.shape),
        lengths_N=rows.mask_NC.sum(dim=1),
        truncated_N=torch.zeros(len(texts), dtype=torch.bool),
        texts=texts,
        exact_logprobs=False,
    )
    assert len(list(split_into_micro_batches(unread, limit))) > 2 * MINIBATCHES
    assert len(unread.lengths_N.unique()) > 1
    scored = score_rollout(policy, unread, objective.readout, limit)
    rollout = replace(unread, logprobs_NC=scored.logprobs)
    old = score_old_policy(policy, objective, rollout, limit)
    assert old is not None
    assert_close(old.logprobs_NC[rows.mask_NC], rows.old_NC[rows.mask_NC], rtol=0, atol=1e-4)
    rewards_RBG = torch.tensor([score(text) for text in texts]).view(1, PROMPTS, GROUP)
    advantages_N = build_advantage(cfg)(rewards_RBG, torch.ones(1)).flatten()
    assert_close(advantages_N, rows.advantages_N, rtol=1e-5, atol=1e-6)
    of_reference = score_rollout(reference.model, rollout, objective.readout, limit)

    recorder: list[RecordingSGD] = []

    def build_sgd(
        groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]
    ) -> RecordingSGD:
        recorder.append(RecordingSGD(groups, lr))
        return recorder[0]

    monkeypatch.setitem(optim.OPTIMIZERS, "sgd", build_sgd)
    monkeypatch.setattr(minibatches, "assign_minibatches", lambda *a: rows.minibatch_B)
    optimizer = Optimizer(
        policy.model, "sgd", rate, MINIBATCHES * ITERATIONS, SCHEDULES["constant"], 0, 0.0,
        (0.9, 0.999), 0.0,
    )  # fmt: skip
    learned = UpdateInputs(advantages_N, old, of_reference.plain_logprobs, KL_WEIGHT)
    updated = update_policy(policy, reference, optimizer, objective, rollout, learned, limit)
    return updated.metrics, Steps(
        recorder[0].name_gradients(policy.model), updated.metrics["loss/total"]
    )


@pytest.mark.parametrize("rate", [0.0, 0.05], ids=["at rest", "moving"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_optimizer_steps_gradient_is_trls(
    name: str, rate: float, tiny: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32, to 1e-5 of the largest: where all ratios are 1, and where some are past the clip."""
    overrides, settings = ALGORITHMS[name]
    rows, peer_steps = train_peer(settings, rate, tmp_path, monkeypatch)
    metrics, our_steps = train_ours(
        [f"algorithm={name}", *overrides], rate, rows, tiny, monkeypatch
    )
    assert (metrics["policy/clip_fraction"] > 0) == (rate > 0)
    assert (metrics["policy/ratio_max"] > 1.1) == (rate > 0)
    assert metrics["kl/mean"] > 1e-4
    assert len(our_steps.gradients) == len(peer_steps.gradients) == MINIBATCHES * ITERATIONS
    assert our_steps.loss == pytest.approx(peer_steps.loss, rel=1e-5, abs=1e-6)
    largest = max(float(g.abs().max()) for step in peer_steps.gradients for g in step.values())
    for gradients, peer_gradients in zip(our_steps.gradients, peer_steps.gradients, strict=True):
        assert gradients.keys() == peer_gradients.keys()
        for key, gradient in peer_gradients.items():
            assert float((gradients[key] - gradient).abs().max()) <= 1e-5 * largest, key
