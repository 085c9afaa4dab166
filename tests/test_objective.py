"""The math against numbers worked out by hand, and against itself told another way."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import tensor
from torch.testing import assert_close

from grpo.objective import clipped_surrogate, group_advantages, k1, k2, k3, sequence_mean

REWARDS = st.integers(2, 8).flatmap(
    lambda g: st.lists(
        st.lists(st.floats(-10, 10, width=32), min_size=g, max_size=g), min_size=1, max_size=5
    )
)


def test_advantages_by_hand() -> None:
    # 1,0,0,0: mean 1/4, squared distances 9/16 + 3/16, over 3 = 1/4, so the deviation is 1/2.
    # 3,1,3,1: mean 2, squared distances 4, over 3, deviation 1.1547.
    advantages = group_advantages(tensor([[1.0, 0, 0, 0], [3, 1, 3, 1]]), epsilon=0.0)
    assert_close(advantages[0], tensor([1.5, -0.5, -0.5, -0.5]))
    assert_close(advantages[1], tensor([1.0, -1, 1, -1]) * math.sqrt(3) / 2)


def test_a_group_that_agrees_has_no_advantage_at_all() -> None:
    # 0.1 has no exact float, so its mean over three need not be 0.1: still exactly zero.
    assert torch.equal(group_advantages(torch.full((4, 3), 0.1)), torch.zeros(4, 3))


@given(REWARDS)
def test_advantages_keep_order_and_sum_to_zero(rewards: list[list[float]]) -> None:
    rewards_BG = tensor(rewards, dtype=torch.float64)
    advantages_BG = group_advantages(rewards_BG)
    assert advantages_BG.isfinite().all()
    assert_close(advantages_BG.sum(dim=1), torch.zeros(len(rewards)).double(), atol=1e-6, rtol=0)
    higher = rewards_BG[:, :, None] > rewards_BG[:, None, :]
    assert (advantages_BG[:, :, None] - advantages_BG[:, None, :])[higher].ge(0).all()


@given(REWARDS, st.floats(0.1, 10), st.floats(-5, 5))
def test_advantages_ignore_the_scale_of_a_reward(
    rewards: list[list[float]], scale: float, shift: float
) -> None:
    rewards_BG = tensor(rewards, dtype=torch.float64).round(decimals=2)
    assume((rewards_BG.std(dim=1) > 0).all())
    assert_close(
        group_advantages(rewards_BG * scale + shift, epsilon=0.0),
        group_advantages(rewards_BG, epsilon=0.0),
        atol=1e-6,
        rtol=1e-6,
    )


def test_kl_estimators_by_hand() -> None:
    # Policy 1/2, reference 1/4: log r = -log 2, r = 1/2.
    policy, reference = tensor([0.5]).log(), tensor([0.25]).log()
    assert_close(k1(policy, reference), tensor([math.log(2)]))
    assert_close(k2(policy, reference), tensor([math.log(2) ** 2 / 2]))
    assert_close(k3(policy, reference), tensor([0.5 - 1 + math.log(2)]))


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_unbiased(estimator: object) -> None:
    """Their mean over the policy, summed over all outcomes, is the divergence itself."""
    torch.manual_seed(0)
    policy = torch.randn(50, dtype=torch.float64).log_softmax(0)
    reference = torch.randn(50, dtype=torch.float64).log_softmax(0)
    exact = (policy.exp() * (policy - reference)).sum()
    assert_close((policy.exp() * estimator(policy, reference)).sum(), exact)  # type: ignore[operator]


def test_the_gradient_of_k2_is_that_of_the_divergence_and_k1_has_none() -> None:
    torch.manual_seed(0)
    logits = torch.randn(20, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(20, dtype=torch.float64).log_softmax(0)
    policy = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits)
    for estimator, expected in ((k2, exact), (k1, torch.zeros_like(exact))):
        policy = logits.log_softmax(0)
        # What sampling gives on average: the probabilities weigh the tokens, and are no variable.
        on_policy = (policy.detach().exp() * estimator(policy, reference)).sum()
        (gradient,) = torch.autograd.grad(on_policy, logits)
        assert_close(gradient, expected)


def test_the_surrogate_by_hand() -> None:
    # Ratios 1.5, 0.5, 1.1 with advantage +2: clipped at 1.2 above, never below when positive.
    ratios = tensor([[1.5, 0.5, 1.1], [1.5, 0.5, 1.1]])
    loss, clipped = clipped_surrogate(ratios.log(), torch.zeros(2, 3), tensor([2.0, -2.0]))
    assert_close(loss, tensor([[-2.4, -1.0, -2.2], [3.0, 1.6, 2.2]]))
    assert clipped.tolist() == [[True, False, False], [False, True, False]]


def test_the_clip_may_be_wider_above() -> None:
    loss, _ = clipped_surrogate(
        tensor([[1.5, 1.25]]).log(), torch.zeros(1, 2), tensor([1.0]), clip_low=0.2, clip_high=0.3
    )
    assert_close(loss, tensor([[-1.3, -1.25]]))


def test_on_policy_the_value_is_constant_and_the_gradient_is_not() -> None:
    """Ratio 1: the loss is -advantage whatever the policy, its gradient -advantage · ∇ log p."""
    logprobs = tensor([[-1.0, -2.0]], requires_grad=True)
    loss, clipped = clipped_surrogate(logprobs, logprobs.detach(), tensor([3.0]))
    assert_close(loss, tensor([[-3.0, -3.0]]))
    loss.sum().backward()
    assert_close(logprobs.grad, tensor([[-3.0, -3.0]]))
    assert not clipped.any()


def test_a_clipped_token_has_no_gradient() -> None:
    logprobs = tensor([[math.log(1.5)]], requires_grad=True)
    loss, clipped = clipped_surrogate(logprobs, torch.zeros(1, 1), tensor([1.0]))
    loss.sum().backward()
    assert clipped.item()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == 0.0


def test_sequence_weights_by_hand() -> None:
    weights = sequence_mean(tensor([[1, 1, 1, 1], [1, 0, 0, 0]]).bool())
    assert_close(weights, tensor([[1 / 8, 1 / 8, 1 / 8, 1 / 8], [1 / 2, 0, 0, 0]]))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_sequence_weights_are_the_mean_of_the_means(lengths: list[int]) -> None:
    mask_NC = torch.arange(9) < tensor(lengths)[:, None]
    values_NC = torch.rand(len(lengths), 9)
    mean_of_means = torch.stack(
        [row[:length].mean() for row, length in zip(values_NC, lengths, strict=True)]
    ).mean()
    assert_close((sequence_mean(mask_NC) * values_NC).sum(), mean_of_means)
