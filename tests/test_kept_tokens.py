"""Tests that the tokens which sampling kept stay the same after the policy has moved."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from grpo.memory.budget import Budget
from grpo.models.forward import Completions
from grpo.models.head import TokenScores
from grpo.models.load import LanguageModel
from grpo.objective import AVERAGINGS, RATIOS, clipped_surrogate
from grpo.rollout import NativeEngine
from grpo.training import update as update_module
from grpo.training.loss import MicroBatchLoss, Minibatch, Objective, UpdateInputs, compute_loss
from grpo.training.optimizer import SCHEDULES, Optimizer
from grpo.training.update import score_old_policy, update_policy
from grpo.types import Example, Prompt, Rollout, Sampling

QUESTIONS = ("What is 12 + 63?", "What is 88 - 9?", "What is 4 + 4?", "What is 70 - 35?")
GROUP = 3
SAMPLINGS = {
    "top_p": Sampling(temperature=1.2, top_p=0.8),
    "top_k": Sampling(temperature=1.2, top_k=4),
    "min_p": Sampling(temperature=1.2, min_p=0.1),
}


class SnapshotOptimizer(Optimizer):
    """Keeps a copy of the model as it was after each step."""

    model: nn.Module
    after: list[nn.Module]

    def step(self) -> dict[str, float]:
        stats = super().step()
        self.after.append(copy.deepcopy(self.model))
        return stats


@torch.no_grad()
def compute_logits(model: nn.Module, rollout: Rollout, row: int, temperature: float) -> Tensor:
    """Returns the logits [C, V] before each token of a completion, by a separate plain forward."""
    prompt = rollout.prompts[row // rollout.num_generation].token_ids
    completion = rollout.tokens_NC[row, : rollout.lengths_N[row]].tolist()
    logits_SV = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    return logits_SV[len(prompt) - 1 : -1] / temperature


def select_kept(logits_V: Tensor, sampling: Sampling) -> set[int]:
    """Returns the tokens that top-k, top-p or min-p keeps, by their definitions."""
    probabilities = logits_V.softmax(dim=0).tolist()
    ranked = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    if sampling.top_k:
        return set(ranked[: sampling.top_k])
    if sampling.min_p:
        least = sampling.min_p * probabilities[ranked[0]]
        return {token for token in ranked if probabilities[token] >= least}
    kept, total = set(), 0.0
    for token in ranked:
        kept.add(token)
        total += probabilities[token]
        if total >= sampling.top_p:
            break
    return kept


def log_ratio(token: int, old_V: Tensor, new_V: Tensor, kept: set[int]) -> float:
    """Returns log pi_new / pi_old of a token, both over the same kept tokens."""
    ids = sorted(kept)
    among = old_V[ids].logsumexp(dim=0) - new_V[ids].logsumexp(dim=0)
    return float(new_V[token] - old_V[token] + among)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_ratio_is_over_what_the_sampler_kept(
    name: str, tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks the second of two minibatches, after a step that changes which tokens are kept."""
    sampling, limit = SAMPLINGS[name], Budget.from_tokens(150)
    prompts = [
        Prompt(question, tuple(tiny.tokenizer.encode(question)), Example(question, "", float))
        for question in QUESTIONS
    ]
    rollout = NativeEngine(tiny, 12, limit).generate(prompts, GROUP, sampling, seed=3)
    objective = Objective(
        RATIOS["token"], clipped_surrogate, AVERAGINGS["token_mean"], None, sampling, 12,
        minibatches=2,
    )  # fmt: skip
    before = copy.deepcopy(tiny.model)
    old = score_old_policy(tiny, objective, rollout, limit.forward_limit)
    optimizer = SnapshotOptimizer(
        tiny.model, "adamw", 5e-3, 2, SCHEDULES["constant"], 0, 0.0, (0.9, 0.99), 0.0
    )
    optimizer.model, optimizer.after = tiny.model, []
    ratios: dict[int, tuple[int, Tensor]] = {}  # row -> steps taken before, ratios of its tokens

    def record_ratios(
        objective: Objective,
        rollout: Rollout,
        learned: UpdateInputs,
        minibatch: Minibatch,
        rows: Tensor,
        inputs: Completions,
        scored: TokenScores,
    ) -> MicroBatchLoss:
        loss = compute_loss(objective, rollout, learned, minibatch, rows, inputs, scored)
        for row, ratio_C, mask_C in zip(rows.tolist(), loss.ratio_NC, inputs.mask_NC, strict=True):
            ratios[row] = (len(optimizer.after), ratio_C[mask_C])
        return loss

    monkeypatch.setattr(update_module, "compute_loss", record_ratios)
    generator = torch.Generator().manual_seed(5)
    advantages_N = torch.randn(len(rollout.texts), generator=generator)
    learned = UpdateInputs(advantages_N, old, None, 0.0)
    update_policy(tiny, None, optimizer, objective, rollout, learned, limit.forward_limit)

    second = [row for row, (step, _) in ratios.items() if step == 1]
    assert len(second) == len(ratios) / 2 == len(QUESTIONS) * GROUP / 2
    elsewhere = outside = 0  # places where the new policy keeps other tokens, or drops this one
    for row in second:
        old_CV = compute_logits(before, rollout, row, sampling.temperature)
        new_CV = compute_logits(optimizer.after[0], rollout, row, sampling.temperature)
        for place, ratio in enumerate(ratios[row][1].tolist()):
            token, old_V, new_V = int(rollout.tokens_NC[row, place]), old_CV[place], new_CV[place]
            kept, new_kept = select_kept(old_V, sampling), select_kept(new_V, sampling)
            assert token in kept
            expected = log_ratio(token, old_V, new_V, kept)
            assert torch.tensor(ratio).log().item() == pytest.approx(expected, abs=1e-4)
            elsewhere += kept != new_kept
            outside += token not in new_kept
    assert elsewhere > 10
    assert outside > 0
