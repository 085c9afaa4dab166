"""One update: the paper's gradient, whatever the micro-batches."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from grpo.device import Device, open_device
from grpo.memory.budget import Budget, TokenLimit
from grpo.memory.microbatch import score_rollout, split_head_chunks, split_into_micro_batches
from grpo.models import head as head_module
from grpo.models.forward import Completions
from grpo.models.head import Readout
from grpo.models.load import LanguageModel
from grpo.models.reference import Reference, make_reference
from grpo.objective import (
    AVERAGINGS,
    DIVERGENCES,
    RATIOS,
    AdaptiveWeight,
    OffPolicyCorrection,
    Tokens,
    clipped_surrogate,
    top_entropy_mask,
)
from grpo.objective.advantages import group_mean, group_std
from grpo.objective.kl import k1, k3
from grpo.rollout import NativeEngine
from grpo.training.kl_penalty import KLPenalty
from grpo.training.loss import KLTerm, Objective, OldPolicy, UpdateInputs
from grpo.training.minibatches import split_minibatches
from grpo.training.optimizer import SCHEDULES, Optimizer
from grpo.training.update import add_gradients as add_gradients
from grpo.training.update import update_policy as update_learned
from grpo.types import Example, Prompt, Rollout, Sampling
from tests.conftest import SHAPE
from tests.test_rollout import draw_prompts, wrap

ROOT = Path(__file__).resolve().parents[1]
SAMPLING = Sampling(temperature=1.3)
ROOM = Budget.from_tokens(10**6)
KL = KLTerm(estimator=k3, divergence=None, in_reward=False, unbiased_gradient=False)
OBJECTIVE = Objective(
    RATIOS["token"], clipped_surrogate, AVERAGINGS["sequence_mean"], KL, SAMPLING, max_tokens=16
)


def group_advantages(rewards_BG: Tensor) -> Tensor:
    return (rewards_BG - group_mean(rewards_BG)) / group_std(rewards_BG)


def update(
    policy: LanguageModel,
    reference: Reference | None,
    optimizer: Optimizer,
    objective: Objective,
    rollout: Rollout,
    advantages_BG: Tensor,
    tokens: int,
    old_NC: Tensor | None = None,
) -> dict[str, float]:
    """Runs one update, with kl_weight 0.1 if there is a reference, under a token limit.

    old_NC: the old policy's log-probabilities; None for the sampler's.
    """
    reference_NC, limit = None, Budget.from_tokens(tokens).forward_limit
    if reference is not None and objective.kl is not None:
        weight = AdaptiveWeight(0.1, None, 1)
        pull = KLPenalty(policy, reference, objective.kl, weight, SAMPLING, limit, 0, 1.0)
        pull.policy_is_reference = False  # the policy is trained already
        reference_NC = pull.score(rollout).reference_NC
    old = OldPolicy(rollout.logprobs_NC if old_NC is None else old_NC)
    learned = UpdateInputs(advantages_BG.flatten(), old, reference_NC, 0.1 if reference else 0.0)
    return update_learned(policy, reference, optimizer, objective, rollout, learned, limit).metrics


def build_optimizer(
    policy: LanguageModel, max_grad_norm: float = 0.0, learning_rate: float = 1e-3
) -> Optimizer:
    schedule = SCHEDULES["constant"]
    return Optimizer(
        policy.model, "adamw", learning_rate, 10, schedule, 0, 0.0, (0.9, 0.99), max_grad_norm
    )


def generate_rollout(policy: LanguageModel, prompts: int, group: int) -> Rollout:
    questions = ["What is 47 + 38?", "What is 5 - 3?", "Hello, you", "1", "What is 90 - 81?"]
    return NativeEngine(policy, 16, ROOM).generate(
        [
            Prompt(q, tuple(policy.tokenizer.encode(q)), Example(q, "0", float))
            for q in questions[:prompts]
        ],
        group,
        SAMPLING,
        seed=4,
    )


def shake(policy: LanguageModel) -> LanguageModel:
    """Changes the policy a little, so that it differs from its reference and from its sampler."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return policy


def paper_loss(
    policy: LanguageModel, reference: Reference, rollout: Rollout, advantages_BG: Tensor
) -> Tensor:
    """Computes DeepSeekMath's eq. 3 and 4 literally: a loop over completions, one forward each."""
    total = torch.zeros(())
    for n, prompt in enumerate(p for p in rollout.prompts for _ in range(rollout.num_generation)):
        completion = rollout.tokens_NC[n, : rollout.lengths_N[n]]
        tokens = torch.cat([torch.tensor(prompt.token_ids), completion])[None]

        def compute_logprobs(
            model: LanguageModel, tokens: Tensor = tokens, completion: Tensor = completion
        ) -> Tensor:
            logits = model.model(input_ids=tokens).logits[0, -len(completion) - 1 : -1] / 1.3
            return torch.log_softmax(logits, -1).gather(1, completion[:, None])[:, 0]

        new, old = compute_logprobs(policy), rollout.logprobs_NC[n, : len(completion)]
        with torch.no_grad():
            base = compute_logprobs(reference.model)
        advantage, ratio = advantages_BG.flatten()[n], torch.exp(new - old)
        surrogate = torch.min(ratio * advantage, ratio.clip(0.8, 1.2) * advantage)
        kl = torch.exp(base - new) - (base - new) - 1
        total = total + (surrogate - 0.1 * kl).mean() / len(rollout.texts)
    return -total


def copy_gradients(policy: LanguageModel) -> list[Tensor]:
    return [p.grad.clone() for p in policy.model.parameters() if p.grad is not None]


class Kept(Optimizer):
    """An optimizer that keeps the gradients it would have applied."""

    def step(self) -> dict[str, float]:
        self.seen = [p.grad.clone() for p in self.parameters if p.grad is not None]
        return super().step()


@pytest.mark.parametrize("budget", [10**6, 40])
def test_loss_and_gradient_are_the_papers_for_every_architecture(
    small_model: PreTrainedModel, device: Device, budget: int
) -> None:
    """The whole update, shared prefix, chunks and micro-batches, against eq. 3 row by row."""
    policy = wrap(small_model, device, end_ids=tuple(range(0, 97, 7)))
    reference = make_reference(policy, moves=False)
    rollout = NativeEngine(policy, 9, ROOM).generate(draw_prompts(7, 3, 5), 4, SAMPLING, seed=4)
    check_against_paper(shake(policy), reference, rollout, budget)


@pytest.mark.parametrize("budget", [10**6, 150, 40, 1])
def test_loss_and_gradient_are_the_papers_whatever_the_budget(
    tiny: LanguageModel, budget: int
) -> None:
    reference, rollout = make_reference(tiny, moves=False), generate_rollout(tiny, 5, 3)
    assert (
        check_against_paper(shake(tiny), reference, rollout, budget) > 0
    )  # some tokens are clipped


def check_against_paper(
    policy: LanguageModel, reference: Reference, rollout: Rollout, budget: int
) -> float:
    """Compares loss and gradients, to 1e-5 of the largest; returns the share of clipped tokens."""
    shape = (len(rollout.prompts), rollout.num_generation)
    advantages_BG = group_advantages(torch.rand(shape, generator=torch.Generator().manual_seed(0)))
    expected = paper_loss(policy, reference, rollout, advantages_BG)
    expected.backward()
    expected_gradients = copy_gradients(policy)
    policy.model.zero_grad()

    kept = Kept(policy.model, "adamw", 1e-3, 10, SCHEDULES["constant"], 0, 0.0, (0.9, 0.99), 0.0)
    stats = update(policy, reference, kept, OBJECTIVE, rollout, advantages_BG, budget)
    # On-policy, terms of size 1 almost cancel, so there is an absolute tolerance, too.
    assert stats["loss/total"] == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-6)
    largest = max(float(gradient.abs().max()) for gradient in expected_gradients)
    for actual, paper in zip(kept.seen, expected_gradients, strict=True):
        assert float((actual - paper).abs().max()) <= 1e-5 * largest
    return stats["policy/clip_fraction"]


def test_on_policy_the_loss_is_zero_by_construction_and_its_gradient_is_not(
    tiny: LanguageModel,
) -> None:
    rollout = generate_rollout(tiny, 4, 4)
    advantages_BG = group_advantages(torch.rand(4, 4, generator=torch.Generator().manual_seed(0)))
    stats = update(tiny, None, build_optimizer(tiny), OBJECTIVE, rollout, advantages_BG, 10**6)
    assert stats["loss/policy"] == pytest.approx(0.0, abs=1e-5)
    assert stats["optim/grad_norm"] > 0.01
    assert stats["policy/ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert stats["policy/clip_fraction"] == 0.0
    assert not [name for name in stats if name.startswith("kl/")]


def test_a_step_makes_good_completions_likelier_and_bad_ones_less(tiny: LanguageModel) -> None:
    rollout = generate_rollout(tiny, 4, 4)
    advantages_BG = group_advantages(torch.rand(4, 4, generator=torch.Generator().manual_seed(0)))
    careful = build_optimizer(tiny, learning_rate=1e-4)
    update(tiny, None, careful, OBJECTIVE, rollout, advantages_BG, 10**6)
    after = update(tiny, None, careful, OBJECTIVE, rollout, advantages_BG, 10**6)
    assert after["loss/policy"] < -0.01  # the surrogate has risen on the same data


def test_kl_to_the_reference_is_zero_at_first_and_grows(tiny: LanguageModel) -> None:
    reference, rollout = make_reference(tiny, moves=False), generate_rollout(tiny, 3, 4)
    advantages_BG = group_advantages(torch.rand(3, 4, generator=torch.Generator().manual_seed(0)))
    first = update(tiny, reference, build_optimizer(tiny), OBJECTIVE, rollout, advantages_BG, 10**6)
    second = update(
        tiny, reference, build_optimizer(tiny), OBJECTIVE, rollout, advantages_BG, 10**6
    )
    assert first["kl/k3"] == pytest.approx(0.0, abs=1e-6)
    assert second["kl/k3"] > 1e-4
    assert second["kl/mean"] == pytest.approx(second["kl/k3"])
    assert second["loss/total"] == pytest.approx(second["loss/policy"] + second["loss/kl"])


def test_the_reference_is_never_trained(tiny: LanguageModel) -> None:
    reference, rollout = make_reference(tiny, moves=False), generate_rollout(tiny, 2, 4)
    before = copy.deepcopy(reference.model.model.state_dict())
    advantages_BG = group_advantages(torch.rand(2, 4))
    update(tiny, reference, build_optimizer(tiny), OBJECTIVE, rollout, advantages_BG, 10**6)
    for name, weight in reference.model.model.state_dict().items():
        assert torch.equal(weight, before[name])


def record_gradients(
    policy: LanguageModel,
    objective: Objective,
    rollout: Rollout,
    advantages_BG: Tensor,
    reference: Reference | None = None,
    budget: int = 10**6,
    old_NC: Tensor | None = None,
) -> tuple[dict[str, float], list[list[Tensor]]]:
    """Returns an update's result and the gradients of its optimizer steps; changes no weight."""
    kept = KeptAll(policy.model, "adamw", 0.0, 10, SCHEDULES["constant"], 0, 0.0, (0.9, 0.99), 0.0)
    stats = update(policy, reference, kept, objective, rollout, advantages_BG, budget, old_NC)
    return stats, kept.all_seen


class KeptAll(Optimizer):
    """An optimizer that keeps the gradients of every step."""

    @property
    def all_seen(self) -> list[list[Tensor]]:
        return self._seen

    def step(self) -> dict[str, float]:
        self._seen = [*getattr(self, "_seen", []), [p.grad.clone() for p in self.parameters]]  # type: ignore[union-attr]
        return super().step()


def are_close(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> bool:
    largest = max(float(gradient.abs().max()) for gradient in expected)
    return all(
        float((a - b).abs().max()) <= tolerance * largest
        for a, b in zip(actual, expected, strict=True)
    )


@pytest.mark.parametrize("averaging", ["sequence_mean", "token_mean", "constant", "sequence_sum"])
def test_the_gradients_of_minibatches_average_to_that_of_the_whole(
    tiny: LanguageModel, averaging: str
) -> None:
    rollout = generate_rollout(tiny, 4, 3)
    advantages_BG = group_advantages(torch.rand(4, 3, generator=torch.Generator().manual_seed(0)))
    whole = replace(OBJECTIVE, averaging=AVERAGINGS[averaging])
    _, [expected] = record_gradients(tiny, whole, rollout, advantages_BG)
    _, parts = record_gradients(tiny, replace(whole, minibatches=2), rollout, advantages_BG)
    assert len(parts) == 2
    mean = [(a + b) / 2 for a, b in zip(*parts, strict=True)]
    assert are_close(mean, expected)


def test_iterations_and_minibatches_are_optimizer_steps(tiny: LanguageModel) -> None:
    """Three passes of two minibatches are six steps, off-policy from the second on."""
    rollout = generate_rollout(tiny, 4, 3)
    advantages_BG = group_advantages(torch.rand(4, 3, generator=torch.Generator().manual_seed(0)))
    objective, steps = replace(OBJECTIVE, num_iterations=3, minibatches=2), build_optimizer(tiny)
    stats = update(tiny, None, steps, objective, rollout, advantages_BG, 10**6)
    assert steps.steps_done == 6
    assert stats["policy/ratio_max"] > 1.05
    assert stats["policy/clip_fraction"] > 0


def test_groups_without_advantage_cost_no_backward_and_change_nothing(
    tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = generate_rollout(tiny, 4, 3)
    advantages_BG = group_advantages(torch.rand(4, 3, generator=torch.Generator().manual_seed(0)))
    advantages_BG[[0, 2]] = 0.0
    objective = replace(OBJECTIVE, kl=None)
    backwards = []  # through the layers; the head has its own backward, from the loss
    original = Tensor.backward

    def record_backward(self: Tensor, *gradient: Tensor) -> None:
        backwards.extend(gradient)
        original(self, *gradient)

    monkeypatch.setattr(Tensor, "backward", record_backward)
    stats, [skipped] = record_gradients(tiny, objective, rollout, advantages_BG, budget=1)
    assert len(backwards) == 2 * 3  # the rows of the two groups with advantages, one at a time
    with_bonus = replace(objective, entropy_weight=1e-12)  # all gradients are 0
    everything, [all_of_it] = record_gradients(tiny, with_bonus, rollout, advantages_BG, budget=1)
    assert len(backwards) == 2 * 3 + 4 * 3
    assert are_close(skipped, all_of_it)
    assert stats["policy/entropy"] == pytest.approx(everything["policy/entropy"])


def test_truncated_completions_are_masked_out_of_the_whole_loss(tiny: LanguageModel) -> None:
    """The loss is as without them, with the same weights for the other completions."""
    rollout = generate_rollout(tiny, 4, 3)
    rollout = replace(rollout, truncated_N=torch.arange(12) % 3 == 0)
    advantages_BG = group_advantages(torch.rand(4, 3, generator=torch.Generator().manual_seed(0)))
    reference = make_reference(shake(tiny), moves=False)
    masked = replace(OBJECTIVE, mask_truncated=True)
    _, [ours] = record_gradients(tiny, masked, rollout, advantages_BG, reference)

    def weigh_scored(tokens: Tokens) -> Tensor:
        kept_N1 = ~rollout.truncated_N[:, None]
        return AVERAGINGS["sequence_mean"](tokens) * kept_N1

    left_out = replace(OBJECTIVE, averaging=weigh_scored)
    _, [expected] = record_gradients(tiny, left_out, rollout, advantages_BG, reference)
    assert are_close(ours, expected)


@pytest.mark.parametrize("averaging", AVERAGINGS)
def test_completions_without_a_reward_are_as_if_they_had_not_been_sampled(
    averaging: str, tiny: LanguageModel
) -> None:
    """Groups of four with one completion without a reward equal groups of three."""
    four = generate_rollout(tiny, 2, 4)
    unscored_N = torch.arange(8) % 4 == 2
    scored_N = ~unscored_N
    three = replace(
        four,
        tokens_NC=four.tokens_NC[scored_N],
        logprobs_NC=four.logprobs_NC[scored_N],
        lengths_N=four.lengths_N[scored_N],
        truncated_N=four.truncated_N[scored_N],
        texts=tuple(text for text, kept in zip(four.texts, scored_N.tolist(), strict=True) if kept),
    )
    advantages_N = torch.tensor([1.0, -2.0, 0.0, 1.0, 3.0, -1.0, 0.0, -2.0])
    objective = replace(OBJECTIVE, averaging=AVERAGINGS[averaging], kl=None)
    found = []
    for rollout, learned in (
        (four, UpdateInputs(advantages_N, None, None, 0.0, unscored_N)),
        (three, UpdateInputs(advantages_N[scored_N], None, None, 0.0)),
    ):
        (minibatch,) = split_minibatches(
            tiny, objective, rollout, ROOM.forward_limit, 0, learned.unscored_N
        )
        totals = add_gradients(
            tiny, None, objective, rollout, learned, minibatch, ROOM.forward_limit
        )
        found.append(torch.cat([p.grad.flatten() for p in tiny.model.parameters()]))  # type: ignore[union-attr]
        tiny.model.zero_grad()
        found.append(torch.tensor(totals.losses["loss/policy"]))
    assert found[0].abs().max() > 0
    assert_close(found[0], found[2])
    assert_close(found[1], found[3])


def compute_full_logprobs(model: LanguageModel, rollout: Rollout, n: int) -> Tensor:
    """Returns [C, V] the log-probabilities of one row, from the model's own logits."""
    prompt = rollout.prompts[n // rollout.num_generation]
    completion = rollout.tokens_NC[n, : rollout.lengths_N[n]]
    tokens = torch.cat([torch.tensor(prompt.token_ids), completion])[None]
    logits = model.model(input_ids=tokens).logits[0, -len(completion) - 1 : -1] / 1.3
    return torch.log_softmax(logits, -1)


@pytest.mark.parametrize("direction", DIVERGENCES)
def test_the_exact_divergence_and_its_gradient_by_whole_distributions(
    tiny: LanguageModel, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compares chunks of a few rows with a loop that holds every distribution at once."""
    monkeypatch.setitem(head_module.CHUNK_LOGITS, "cpu", 319 * 5)
    reference, rollout = make_reference(tiny, moves=False), generate_rollout(tiny, 3, 3)
    shake(tiny)
    divergence = DIVERGENCES[direction]
    term = KLTerm(None, divergence, in_reward=False, unbiased_gradient=False)
    objective = replace(OBJECTIVE, kl=term)
    stats, [ours] = record_gradients(
        tiny, objective, rollout, torch.zeros(3, 3), reference, budget=60
    )
    tiny.model.zero_grad()
    total = torch.zeros(())
    for n in range(9):
        with torch.no_grad():
            base = compute_full_logprobs(reference.model, rollout, n)
        total = total + divergence(compute_full_logprobs(tiny, rollout, n), base).mean() / 9
    (0.1 * total).backward()
    assert stats["loss/kl"] == pytest.approx(0.1 * float(total.detach()), rel=1e-5)
    assert stats["kl/full"] == stats["kl/mean"] > 0.01
    assert are_close(ours, copy_gradients(tiny))


@pytest.mark.parametrize("rows", [1, 20], ids=["a row over and over", "some rows at once"])
def test_in_how_many_parts_the_head_is_read_changes_no_number(
    tiny: LanguageModel, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests all scores of a readout, with completions longer and shorter than a chunk."""
    reference, rollout = make_reference(tiny, moves=False), generate_rollout(tiny, 3, 3)
    shake(tiny)
    cut = Sampling(temperature=1.3, top_p=0.9, repetition_penalty=1.2)
    exact = KLTerm(None, DIVERGENCES["reverse"], in_reward=False, unbiased_gradient=False)
    advantages_BG = group_advantages(torch.rand(3, 3, generator=torch.Generator().manual_seed(0)))
    for objective in (
        OBJECTIVE,
        replace(OBJECTIVE, ratio=RATIOS["sequence"]),
        replace(OBJECTIVE, sampling=cut, kl=exact, entropy_weight=0.1),
    ):
        results = []
        for chunk in (rows * tiny.head.vocabulary, 10**9):
            monkeypatch.setitem(head_module.CHUNK_LOGITS, "cpu", chunk)
            tiny.model.zero_grad()
            results.append(
                record_gradients(tiny, objective, rollout, advantages_BG, reference, budget=200)
            )
        (stats, [ours]), (whole_stats, [whole]) = results
        assert stats == pytest.approx(whole_stats, rel=1e-5, abs=1e-8)
        assert are_close(ours, whole)


def test_the_entropy_bonus_has_the_entropys_gradient(tiny: LanguageModel) -> None:
    rollout = generate_rollout(tiny, 3, 3)
    objective = replace(OBJECTIVE, kl=None, entropy_weight=0.5)
    stats, [ours] = record_gradients(tiny, objective, rollout, torch.zeros(3, 3))
    tiny.model.zero_grad()
    total = torch.zeros(())
    for n in range(9):
        logprobs = compute_full_logprobs(tiny, rollout, n)
        total = total - (logprobs.exp() * logprobs).sum(-1).mean() / 9
    (-0.5 * total).backward()
    assert stats["loss/entropy"] == pytest.approx(-0.5 * float(total.detach()), rel=1e-5)
    assert are_close(ours, copy_gradients(tiny))


def test_only_uncertain_tokens_are_trained_on_and_all_are_in_the_kl(tiny: LanguageModel) -> None:
    rollout, reference = generate_rollout(tiny, 4, 3), make_reference(tiny, moves=False)
    shake(tiny)
    advantages_BG = group_advantages(torch.rand(4, 3, generator=torch.Generator().manual_seed(0)))
    entropy_NC = score_rollout(tiny, rollout, Readout(SAMPLING), ROOM.forward_limit).entropy
    chosen_NC = top_entropy_mask(entropy_NC, rollout.mask_NC, 0.25)
    assert 0.2 < float(chosen_NC.sum() / rollout.mask_NC.sum()) < 0.3

    def weigh_chosen(tokens: Tokens) -> Tensor:
        return AVERAGINGS["sequence_mean"](tokens) * chosen_NC

    some = replace(OBJECTIVE, top_entropy=0.25)
    _, [ours] = record_gradients(tiny, some, rollout, advantages_BG, reference)
    policy_alone = replace(OBJECTIVE, kl=None, averaging=weigh_chosen)
    _, [policys] = record_gradients(tiny, policy_alone, rollout, advantages_BG)
    _, [kls] = record_gradients(tiny, OBJECTIVE, rollout, torch.zeros(4, 3), reference)
    assert are_close(ours, [a + b for a, b in zip(policys, kls, strict=True)])


def test_what_another_sampler_wrote_counts_by_truncated_importance(tiny: LanguageModel) -> None:
    """The importance weight multiplies each advantage, and leaves the KL as it is."""
    rollout, reference = generate_rollout(tiny, 2, 3), make_reference(tiny, moves=False)
    advantages_BG = group_advantages(torch.rand(2, 3, generator=torch.Generator().manual_seed(0)))
    likelier_N1 = torch.tensor([0.5, 1.0, 1.5, 2.0, 4.0, 0.1])[:, None]  # to the policy
    old_NC = rollout.logprobs_NC
    sampled = replace(rollout, logprobs_NC=old_NC - likelier_N1.log())
    counts_BG = torch.tensor([[0.5, 1.0, 1.5], [2.0, 2.0, 0.1]])
    for term, against in ((None, None), (KL, reference)):
        capped = replace(OBJECTIVE, kl=term, correction=OffPolicyCorrection(high=2.0))
        stats, [ours] = record_gradients(
            tiny, capped, sampled, advantages_BG, against, old_NC=old_NC
        )
        assert stats["sampler/importance_max"] == pytest.approx(4.0)
        assert stats["sampler/importance_min"] == pytest.approx(0.1)
        _, [wanted] = record_gradients(tiny, capped, rollout, advantages_BG * counts_BG, against)
        assert are_close(ours, wanted)
        _, [uncounted] = record_gradients(tiny, capped, rollout, advantages_BG, against)
        assert not are_close(uncounted, wanted)


def test_how_far_the_sampler_was_is_the_k3_of_its_tokens(tiny: LanguageModel) -> None:
    """Policy / sampler of 2, 1/2 and 1 give 2 - 1 - log 2, 1/2 - 1 + log 2 and 0."""
    rollout = generate_rollout(tiny, 1, 2)
    likelier_NC = torch.ones_like(rollout.logprobs_NC)
    likelier_NC[0, 0], likelier_NC[1, 0] = 2.0, 0.5
    sampled = replace(rollout, logprobs_NC=rollout.logprobs_NC - likelier_NC.log())
    old_NC = rollout.logprobs_NC
    advantages_BG = torch.tensor([[1.0, -1.0]])
    stats, _ = record_gradients(
        tiny, replace(OBJECTIVE, kl=None), sampled, advantages_BG, old_NC=old_NC
    )
    expected = (2 - 1 - math.log(2) + 0.5 - 1 + math.log(2)) / int(rollout.lengths_N.sum())
    assert stats["sampler/kl"] == pytest.approx(expected, rel=1e-4)


def test_gradient_checkpointing_changes_memory_and_no_number(small_model: PreTrainedModel) -> None:
    """The gradients are the same to the bit; less is kept between forward and backward."""
    policy = wrap(small_model, open_device("cpu", "fp32"), end_ids=(1,))
    rollout = NativeEngine(policy, 9, ROOM).generate(draw_prompts(7, 3, 5), 4, SAMPLING, seed=4)
    advantages_BG = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    results = []
    for recompute in (False, True):
        kept: dict[int, int] = {}

        def count(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            objective = replace(OBJECTIVE, kl=None)
            recomputing = replace(policy, recompute=recompute)
            _, [found] = record_gradients(recomputing, objective, rollout, advantages_BG)
        results.append((found, len(kept)))
    (plain, many), (again, few) = results
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert few < 0.6 * many


def test_a_reference_moves_toward_the_policy(tiny: LanguageModel) -> None:
    """It moves half of the way, then all of it."""
    reference = make_reference(tiny, moves=True)
    before = [weight.clone() for weight in reference.model.model.parameters()]
    shake(tiny)
    reference.move(0.5)
    pairs = zip(before, reference.model.model.parameters(), tiny.model.parameters(), strict=True)
    for was, now, goal in pairs:
        assert_close(now, (was + goal) / 2)
    reference.move(1.0)
    for moved, goal in zip(
        reference.model.model.parameters(), tiny.model.parameters(), strict=True
    ):
        assert torch.equal(moved, goal)


def test_a_kl_in_the_reward_is_the_sum_over_a_completions_tokens(tiny: LanguageModel) -> None:
    reference = make_reference(shake(tiny), moves=False)
    rollout = generate_rollout(tiny, 3, 3)
    with torch.no_grad():
        for parameter in tiny.model.parameters():
            parameter.add_(0.01)  # the sampler stays the same, as in later updates of a step
    term = KLTerm(k1, None, in_reward=True, unbiased_gradient=False)
    pull = KLPenalty(
        tiny, reference, term, AdaptiveWeight(0.5, None, 1), SAMPLING, ROOM.forward_limit, 0, 1.0
    )
    pull.policy_is_reference = False
    pulled = pull.score(rollout)
    assert pulled.weight == 0.5
    assert pulled.divergence_BG is not None
    for n in range(9):
        completion = rollout.tokens_NC[n, : rollout.lengths_N[n], None]
        base = compute_full_logprobs(reference.model, rollout, n).gather(1, completion)[:, 0]
        expected = (rollout.logprobs_NC[n, : len(completion)] - base).sum()
        assert_close(pulled.divergence_BG.flatten()[n], expected, atol=1e-4, rtol=1e-4)


def test_while_the_policy_is_the_reference_the_samplers_numbers_are_its(
    tiny: LanguageModel,
) -> None:
    """Before the first update, and after each copy to the reference, no forward pass runs in it."""
    rollout, reference = generate_rollout(tiny, 3, 3), make_reference(tiny, moves=True)

    def build_penalty(sampling: Sampling, share: float) -> KLPenalty:
        weight = AdaptiveWeight(0.1, None, 1)
        return KLPenalty(tiny, reference, KL, weight, sampling, ROOM.forward_limit, 2, share)

    pull = build_penalty(SAMPLING, 1.0)
    assert pull.score(rollout).reference_NC is rollout.logprobs_NC
    pull.after_update(1, {"kl/mean": 0.0}, 9)
    computed = pull.score(rollout).reference_NC
    assert computed is not rollout.logprobs_NC
    assert_close(computed, rollout.logprobs_NC, atol=1e-5, rtol=1e-5)
    resumed = build_penalty(SAMPLING, 1.0)
    resumed.load_state(pull.state())
    assert resumed.score(rollout).reference_NC is not rollout.logprobs_NC
    pull.after_update(2, {"kl/mean": 0.0}, 9)  # copied
    assert pull.score(rollout).reference_NC is rollout.logprobs_NC
    halfway = build_penalty(SAMPLING, 0.5)
    halfway.after_update(2, {"kl/mean": 0.0}, 9)
    assert halfway.score(rollout).reference_NC is not rollout.logprobs_NC
    # With top-k, the KL can't use the sampler's log-probabilities, which leave out tokens.
    cut = build_penalty(replace(SAMPLING, top_k=5), 1.0)
    assert cut.score(rollout).reference_NC is not rollout.logprobs_NC


def build_rollout(prompt_lengths: list[int], lengths: list[list[int]]) -> Rollout:
    rows = torch.tensor(lengths).flatten()
    example = Example("q", "a", float)
    return Rollout(
        prompts=tuple(Prompt("q", (1,) * length, example) for length in prompt_lengths),
        tokens_NC=torch.zeros(len(rows), int(rows.max()), dtype=torch.int64),
        logprobs_NC=torch.zeros(len(rows), int(rows.max())),
        lengths_N=rows,
        truncated_N=torch.zeros(len(rows), dtype=torch.bool),
        texts=("",) * len(rows),
    )


@settings(max_examples=200)
@given(st.data(), st.integers(1, 6), st.integers(1, 5), st.integers(1, 400))
def test_micro_batches_hold_every_row_once_and_keep_to_the_budget(
    data: st.DataObject, prompts: int, group: int, budget: int
) -> None:
    length = st.integers(1, 30)
    prompt_lengths = data.draw(st.lists(length, min_size=prompts, max_size=prompts))
    group_lengths = st.lists(length, min_size=group, max_size=group)
    lengths = data.draw(st.lists(group_lengths, min_size=prompts, max_size=prompts))
    rollout = build_rollout(prompt_lengths, lengths)
    batches = list(split_into_micro_batches(rollout, Budget.from_tokens(budget).forward_limit))
    rows = torch.cat([batch.rows for batch in batches])
    assert sorted(rows.tolist()) == list(range(prompts * group))
    for batch in batches:
        of_prompts = sum(prompt_lengths[b] for b in batch.prompts)
        assert batch.tokens == of_prompts + int(rollout.lengths_N[batch.rows].sum())
        assert batch.tokens <= budget or len(batch.rows) == 1
        assert (batch.rows // group).unique().tolist() == sorted(batch.prompts)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 20))
def test_the_head_reads_whole_completions_as_many_as_fit(lengths: list[int], most: int) -> None:
    tokens_NC = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask_NC = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    inputs = Completions(tokens_NC[:, :1], torch.ones(len(lengths)), tokens_NC, mask_NC)
    parts = list(split_head_chunks(inputs, most))
    rows = [row for part, _ in parts for row in range(part.start, part.stop)]
    tokens = [token for _, part in parts for token in range(part.start, part.stop)]
    assert rows == list(range(len(lengths)))
    assert tokens == list(range(sum(lengths)))
    for row_slice, token_slice in parts:
        total = sum(lengths[row_slice])
        assert token_slice.stop - token_slice.start == total
        assert total <= most or row_slice.stop - row_slice.start == 1
        if row_slice.stop < len(lengths):
            assert total + lengths[row_slice.stop] > most


def test_micro_batches_are_even_and_cut_no_group_that_fits() -> None:
    """Four groups of 30 tokens split 2 + 2, not 3 + 1; a limit of 20 keeps a group of 30 whole."""
    rollout = build_rollout([10] * 4, [[10, 10]] * 4)
    two_by_two = list(split_into_micro_batches(rollout, TokenLimit(100, 100)))
    assert [batch.tokens for batch in two_by_two] == [60, 60]
    whole = list(split_into_micro_batches(rollout, TokenLimit(20, 1000)))
    assert [batch.rows.tolist() for batch in whole] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    cut = list(split_into_micro_batches(rollout, TokenLimit(20, 29)))
    assert [batch.tokens for batch in cut] == [20] * 8


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(tiny: LanguageModel) -> None:
    before = copy.deepcopy(tiny.model.state_dict())
    steps = build_optimizer(tiny)
    for parameter in steps.parameters:
        parameter.grad = torch.full_like(parameter, math.nan)
    assert steps.step()["optim/skipped"] == 1.0
    for name, weight in tiny.model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_long_gradients_are_scaled_down(tiny: LanguageModel) -> None:
    """After one step, Adam's first moment is (1 - beta1) of the clipped gradient."""
    steps = build_optimizer(tiny, max_grad_norm=1.0)
    for parameter in steps.parameters:
        parameter.grad = torch.ones_like(parameter)
    count = sum(p.numel() for p in steps.parameters)
    assert steps.step()["optim/grad_norm"] == pytest.approx(math.sqrt(count), rel=1e-4)
    moment = steps.adamw.state[steps.parameters[0]]["exp_avg"]
    assert float(moment.max()) == pytest.approx(0.1 / math.sqrt(count), rel=1e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("end", [30, 9, 20])
def test_a_schedule_goes_on_without_a_jump_to_another_end(schedule: str, end: int) -> None:
    """Of twenty planned steps, two are warm-up; after eight steps the end changes."""

    def build_optimizer() -> Optimizer:
        model = nn.Linear(2, 2)
        return Optimizer(model, "adamw", 0.1, 20, SCHEDULES[schedule], 2, 0.0, (0.9, 0.99), 0.0)

    first = build_optimizer()
    rates = [first.step()["optim/learning_rate"] for _ in range(8)]
    coming, second = first.next_learning_rate(), build_optimizer()
    second.load_state(first.state())
    second.end_schedule_after(end - 8)
    assert second.next_learning_rate() == pytest.approx(coming)
    for _ in range(8, end):
        rates.append(second.step()["optim/learning_rate"])
        # Resumed again without a change, the rate is the same to the bit.
        third = build_optimizer()
        third.load_state(second.state())
        third.end_schedule_after(end - second.steps_done)
        assert third.next_learning_rate() == second.next_learning_rate()
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[2:]))
    assert second.next_learning_rate() == pytest.approx(0.0, abs=1e-12)
    if end == 20:
        unbroken = build_optimizer()
        assert rates == [unbroken.step()["optim/learning_rate"] for _ in range(20)]
    if schedule == "linear":
        # Six of eighteen steps down: 2/3 of the rate, then linear from there.
        assert rates[8:] == pytest.approx(
            [0.1 * 2 / 3 * (1 - n / (end - 8)) for n in range(end - 8)]
        )


def test_a_schedule_at_its_end_begins_again_within_the_longer_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    steps = Optimizer(
        nn.Linear(2, 2), "adamw", 0.1, 4, SCHEDULES["linear"], 0, 0.0, (0.9, 0.99), 0.0
    )
    for _ in range(4):
        steps.step()
    steps.end_schedule_after(4)
    assert steps.next_learning_rate() == pytest.approx(0.05)  # four of eight steps down
    assert "as if 8 updates had been planned" in caplog.text


class Untied(nn.Module):
    """An embedding and a head with few rows that get gradients, and a matrix between them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.table, self.head = (nn.Parameter(torch.ones(5000, 8, dtype=dtype)) for _ in range(2))
        self.middle = nn.Parameter(torch.ones(16, 8, dtype=dtype))

    def read_some(self) -> None:
        """Sets the gradients of a step that reads ten rows of the embedding."""
        for parameter in self.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for graded in (self.table.grad[:10], self.middle.grad, self.head.grad[:10]):  # type: ignore[index]
            graded += 1e-3  # type: ignore[operator]


@pytest.mark.parametrize(
    ("dtype", "learning_rate", "moved"),
    [
        (torch.float32, 1e-5, 1.0),
        (torch.float32, 1e-9, 0.0),  # near 1, the precision of fp32 is 6e-8
        (torch.bfloat16, 1e-5, 0.0),  # and that of bf16 is 4e-3
        (torch.bfloat16, 1e-2, 1.0),
    ],
)
def test_whether_steps_round_away_is_seen_where_there_is_a_gradient(
    dtype: torch.dtype, learning_rate: float, moved: float
) -> None:
    model = Untied(dtype)
    steps = Optimizer(
        model, "adamw", learning_rate, 10, SCHEDULES["constant"], 0, 0.0, (0.9, 0.99), 0.0
    )
    model.read_some()
    assert steps.step()["optim/moved"] == moved
    # Half of the middle matrix is so small that any step changes it.
    with torch.no_grad():
        model.middle[8:] = 1e-12
    model.read_some()
    assert steps.step()["optim/moved"] == pytest.approx(max(moved, 0.5), abs=0.15)
    # Without a gradient, the share is 0.
    assert steps.step()["optim/moved"] == 0.0


def test_an_untied_models_steps_are_seen_to_move_it(device: Device) -> None:
    """Its largest matrix is the embedding, and a step reads few of its rows."""
    shape = {**SHAPE, "vocab_size": 4000, "tie_word_embeddings": False}
    torch.manual_seed(0)
    policy = wrap(Qwen2ForCausalLM(Qwen2Config(**shape, head_dim=16)).eval(), device)
    rollout = NativeEngine(policy, 6, ROOM).generate(draw_prompts(7, 3), 3, SAMPLING, seed=4)
    advantages_BG = torch.tensor([[1.0, 0.0, -1.0], [2.0, -1.0, -1.0]])
    for learning_rate, low, high in ((1e-4, 0.9, 1.0), (1e-13, 0.0, 0.05)):
        adamw = build_optimizer(policy, learning_rate=learning_rate)
        found = update(policy, None, adamw, OBJECTIVE, rollout, advantages_BG, 10**6)
        assert low <= found["optim/moved"] <= high


def test_a_resumed_optimizer_keeps_its_state_and_takes_todays_options(tiny: LanguageModel) -> None:
    first = build_optimizer(tiny)
    for parameter in first.parameters:
        parameter.grad = torch.ones_like(parameter)
    first.step()
    second = Optimizer(
        tiny.model, "adamw", 1e-3, 10, SCHEDULES["constant"], 0, 0.3, (0.8, 0.95), 0.0
    )
    second.load_state(first.state())
    assert second.steps_done == 1
    assert second.adamw.param_groups[0]["betas"] == (0.8, 0.95)
    assert second.adamw.param_groups[0]["weight_decay"] == 0.3
    assert second.adamw.state[second.parameters[0]]["step"] == 1


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_the_learning_rate_by_hand(schedule: str, rates: list[float]) -> None:
    """There are four steps of warm-up to 1, then four of the schedule."""
    steps = Optimizer(
        torch.nn.Linear(1, 1), "adamw", 1.0, 8, SCHEDULES[schedule], 4, 0.0, (0.9, 0.99), 1.0
    )  # fmt: skip
    seen = []
    for _ in range(8):
        seen.append(steps.next_learning_rate())
        steps.steps_done += 1
    assert_close(torch.tensor(seen), torch.tensor(rates), atol=1e-6, rtol=0)


UPDATE_OF = """
import json, sys
from dataclasses import replace

import torch
from conftest import SHAPE
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo.memory.allocator import keep_freed_memory
from grpo.device import open_device
from tests.test_rollout import wrap
from tests.test_update import OBJECTIVE, build_optimizer, build_rollout, update

groups, tokens, shape = json.loads(sys.argv[1])
keep_freed_memory()
torch.manual_seed(0)
config = Qwen2Config(**SHAPE | {"max_position_embeddings": 1024} | shape)
policy = wrap(Qwen2ForCausalLM(config).eval(), open_device("cpu", "fp32"))
rollout = build_rollout([20] * groups, [[256] * 8] * groups)
objective = replace(OBJECTIVE, kl=None)
update(policy, None, build_optimizer(policy), objective, rollout, torch.randn(groups, 8), tokens)
print(policy.device.measure_peak_gb())
"""


def measure_peak(groups: int, micro_batch_tokens: int, **shape: int) -> float:
    """Returns the GB of a process that trains once on groups of 8 completions of 256 tokens."""
    arguments = json.dumps([groups, micro_batch_tokens, shape])
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", UPDATE_OF, arguments],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    return float(done.stdout)


@pytest.mark.slow
def test_twice_the_completions_take_no_more_memory() -> None:
    """The micro-batches stay the same; all activations would take 0.6 GB and 1.2 GB."""
    once, twice = (
        measure_peak(groups, 600, hidden_size=256, intermediate_size=1024) for groups in (4, 8)
    )
    assert twice - once < 0.2


@pytest.mark.slow
def test_the_logits_of_a_micro_batch_are_never_there_at_once() -> None:
    """All 64 completions are one micro-batch, whose logits alone would take 3.3 GB."""
    assert measure_peak(8, 60_000, vocab_size=50_000) < 1.5
