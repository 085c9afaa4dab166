"""Tests the math against numbers worked out by hand, and against other ways to compute it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, tensor
from torch.testing import assert_close

from grpo.objective import (
    AVERAGINGS,
    BASELINES,
    ESTIMATORS,
    RATIOS,
    SCALES,
    AdaptiveWeight,
    Normalize,
    Tokens,
    clipped_surrogate,
    clipped_weight,
    gamma_weight,
    policy_gradient,
    sigmoid_gated,
    top_entropy_mask,
)
from grpo.objective.advantages import (
    batch_mean,
    group_mean,
    group_std,
    leave_one_out,
    normalize_then_sum,
    sum_then_normalize,
)
from grpo.objective.kl import (
    DIVERGENCES,
    Estimator,
    forward_full,
    forward_k1,
    forward_k3,
    full,
    k1,
    k2,
    k3,
)

NAN = math.nan
REWARDS = st.integers(2, 8).flatmap(
    lambda g: st.lists(
        st.lists(st.floats(-10, 10, width=32), min_size=g, max_size=g), min_size=1, max_size=5
    )
)


def group_advantages(rewards_BG: Tensor) -> Tensor:
    return Normalize(group_mean, group_std)(rewards_BG)


@pytest.mark.parametrize(
    ("baseline", "scale", "expected"),
    [
        # 1,0,0,0: mean 1/4, squared distances 9/16 + 3/16, over 3 = 1/4, so the deviation is 1/2.
        # 3,1,3,1: mean 2, squared distances 4, over 3, deviation 2/sqrt(3).
        ("group_mean", "group_std", [[1.5, -0.5, -0.5, -0.5], [0.866, -0.866, 0.866, -0.866]]),
        ("group_mean", "none", [[0.75, -0.25, -0.25, -0.25], [1, -1, 1, -1]]),
        # The others of 1 are 0; of a 0, they are 1,0,0. Of a 3: 1,3,1 with mean 5/3.
        ("leave_one_out", "none", [[1, -1 / 3, -1 / 3, -1 / 3], [4 / 3, -4 / 3, 4 / 3, -4 / 3]]),
        # All eight: mean 9/8, sum of squares 21, so 21 - 81/8 = 10.875 over 7, deviation 1.24642.
        ("batch_mean", "batch_std", [[-0.1003, -0.9026, -0.9026, -0.9026], [1.5043, -0.1003] * 2]),
        ("group_mean", "batch_std", [[0.6017, -0.2006, -0.2006, -0.2006], [0.8023, -0.8023] * 2]),
        ("none", "none", [[1.0, 0, 0, 0], [3, 1, 3, 1]]),
    ],
)
def test_advantages_by_hand(baseline: str, scale: str, expected: list[list[float]]) -> None:
    normalize = Normalize(BASELINES[baseline], SCALES[scale])
    found = normalize(tensor([[1.0, 0, 0, 0], [3, 1, 3, 1]]))
    assert_close(found, tensor(expected), atol=4e-4, rtol=0)


def test_groups_that_teach_are_made_up_for_by_their_share() -> None:
    """GPG: in one group of two all rewards are equal, so the other's advantages count twice."""
    rewards_BG = tensor([[1.0, 0.0], [1.0, 1.0]])
    found = Normalize(group_mean, SCALES["informative_share"])(rewards_BG)
    assert found.tolist() == [[1.0, -1.0], [0.0, 0.0]]
    nothing = Normalize(group_mean, SCALES["informative_share"])(torch.ones(2, 2))
    assert nothing.tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out", "batch_mean"])
def test_a_group_that_agrees_has_no_advantage_at_all(baseline: str, scale: str) -> None:
    # 0.1 has no exact float, so its mean over three may differ from it; the result is still zero.
    normalize = Normalize(BASELINES[baseline], SCALES[scale])
    assert torch.equal(normalize(torch.full((4, 3), 0.1)), torch.zeros(4, 3))


def test_a_reward_that_does_not_apply_takes_no_part() -> None:
    """Rewards 1, 0 and NaN give the advantages of a group of two, and zero for the third."""
    parts_RBG, weights_R = tensor([[[1.0, 0.0, NAN]]]), tensor([1.0])
    for baseline, expected in ((group_mean, [0.5, -0.5, 0.0]), (leave_one_out, [1.0, -1.0, 0.0])):
        normalize = Normalize(baseline, SCALES["none"])
        assert sum_then_normalize(parts_RBG, weights_R, normalize).tolist() == [expected]


def test_a_completion_alone_in_its_group_has_nothing_to_be_compared_with() -> None:
    parts_RBG, weights_R = tensor([[[1.0, NAN, NAN]]]), tensor([1.0])
    for baseline in (group_mean, leave_one_out):
        normalize = Normalize(baseline, group_std)
        assert sum_then_normalize(parts_RBG, weights_R, normalize).tolist() == [[0.0, 0.0, 0.0]]


def test_normalising_each_reward_lets_a_small_one_be_heard() -> None:
    """Beside a reward of 0 to 100, one of 0 to 1 has no effect on the sum, but it has in GDPO."""
    parts_RBG = tensor([[[100.0, 100.0, 0.0, 0.0]], [[1.0, 0.0, 1.0, 0.0]]])
    normalize, weights_R = Normalize(group_mean, group_std), tensor([1.0, 1.0])
    summed = sum_then_normalize(parts_RBG, weights_R, normalize)[0]
    each = normalize_then_sum(parts_RBG, weights_R, normalize)[0]
    assert float(summed[0] - summed[1]) < 0.02
    # Each reward gives +-sqrt(3)/2; their sums sqrt(3), 0, 0, -sqrt(3) have deviation sqrt(2).
    assert_close(each, tensor([1.2247, 0.0, 0.0, -1.2247]), atol=4e-4, rtol=0)


def test_batch_mean_works_for_groups_of_one() -> None:
    normalize = Normalize(batch_mean, SCALES["batch_std"])
    assert_close(
        normalize(tensor([[1.0], [0.0]])), tensor([[0.7071], [-0.7071]]), atol=2e-4, rtol=0
    )


@given(REWARDS)
def test_advantages_keep_order_and_sum_to_zero(rewards: list[list[float]]) -> None:
    rewards_BG = tensor(rewards, dtype=torch.float64)
    advantages_BG = group_advantages(rewards_BG)
    assert advantages_BG.isfinite().all()
    assert_close(advantages_BG.sum(dim=1), torch.zeros(len(rewards)).double(), atol=1e-6, rtol=0)
    higher = rewards_BG[:, :, None] > rewards_BG[:, None, :]
    assert (advantages_BG[:, :, None] - advantages_BG[:, None, :])[higher].ge(0).all()


@given(REWARDS)
def test_leave_one_out_is_the_group_mean_stretched(rewards: list[list[float]]) -> None:
    """r - mean of others = G/(G-1) · (r - mean of all)."""
    rewards_BG = tensor(rewards, dtype=torch.float64)
    group = rewards_BG.shape[1]
    assert_close(
        rewards_BG - leave_one_out(rewards_BG),
        (rewards_BG - group_mean(rewards_BG)) * group / (group - 1),
    )


def test_kl_estimators_by_hand() -> None:
    # Policy 1/2, reference 1/4: log r = -log 2, r = 1/2.
    policy, reference = tensor([0.5]).log(), tensor([0.25]).log()
    assert_close(k1(policy, reference), tensor([math.log(2)]))
    assert_close(k2(policy, reference), tensor([math.log(2) ** 2 / 2]))
    assert_close(k3(policy, reference), tensor([0.5 - 1 + math.log(2)]))

    assert_close(forward_k1(policy, reference), tensor([-0.5 * math.log(2)]))
    assert_close(forward_k3(policy, reference), tensor([-0.5 * math.log(2) + 0.5]))


def draw_distributions(seed: int, size: int = 50) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, size, generator=generator, dtype=torch.float64)
    return logits.log_softmax(dim=-1).unbind()


@pytest.mark.parametrize(
    ("estimator", "exact"),
    [(k1, full), (k3, full), (forward_k1, forward_full), (forward_k3, forward_full)],
)
def test_unbiased_estimators_are_unbiased(estimator: Estimator, exact: Estimator) -> None:
    """The mean over the policy is the divergence, summed over all outcomes or sampled."""
    policy, reference = draw_distributions(0)
    expected = exact(policy, reference)
    assert_close((policy.exp() * estimator(policy, reference)).sum(), expected)
    drawn = torch.multinomial(policy.exp(), 200_000, replacement=True, generator=make_generator(1))
    values = estimator(policy[drawn], reference[drawn])
    error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean() - expected)) < 4 * error
    assert error < 0.01


def test_k2_is_biased_in_the_third_order_alone() -> None:
    """Half the distance gives a quarter of the divergence and an eighth of the bias."""
    policy, _ = draw_distributions(0)
    direction = draw_distributions(1)[1]
    biases = []
    for step in (0.02, 0.01):
        reference = (policy + step * direction).log_softmax(dim=-1)
        biases.append(float((policy.exp() * k2(policy, reference)).sum() - full(policy, reference)))
    assert biases[0] / biases[1] == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize(
    ("name", "direction", "weighed", "gradient_of"),
    [
        ("k1", "reverse", False, None),
        ("k2", "reverse", False, "reverse"),
        ("k3", "reverse", False, "forward"),
        ("k1", "reverse", True, "reverse"),
        ("k3", "reverse", True, "reverse"),
        ("k1", "forward", True, "forward"),
        ("k3", "forward", True, "forward"),
    ],
)
def test_whose_gradient_an_estimator_has(
    name: str, direction: str, weighed: bool, gradient_of: str | None
) -> None:
    """Compares the mean gradient of samples with autograd of the exact divergence.

    The probabilities that weight the samples have no gradient; the ratio, if it is used, has one.
    """
    estimator = ESTIMATORS[direction][name]
    start, reference = draw_distributions(2)
    logits = start.clone().requires_grad_()
    policy = logits.log_softmax(dim=-1)
    values = estimator(policy, reference)
    if weighed:
        values = values * torch.exp(policy - policy.detach())
    (gradient,) = torch.autograd.grad((policy.detach().exp() * values).sum(), logits)
    expected = torch.zeros_like(gradient)
    if gradient_of is not None:
        exact = DIVERGENCES[gradient_of](logits.log_softmax(dim=-1), reference)
        (expected,) = torch.autograd.grad(exact, logits)
    assert_close(gradient, expected)


def test_the_weight_follows_the_divergence_by_hand() -> None:
    """Twice the target is an error of 1, clipped to 0.2; 100 of 1000 completions add 2%."""
    weight = AdaptiveWeight(0.1, target=0.01, horizon=1000)
    weight.observe(0.02, completions=100)
    assert weight.weight == pytest.approx(0.102)
    weight.observe(0.009, completions=500)  # a tenth below the target: the weight falls by 5%
    assert weight.weight == pytest.approx(0.102 * 0.95)
    weight.observe(NAN, completions=500)  # of a broken step
    assert weight.weight == pytest.approx(0.102 * 0.95)
    fixed = AdaptiveWeight(0.1, target=None, horizon=1000)
    fixed.observe(5.0, completions=1000)
    assert fixed.weight == 0.1


def test_ratios_by_hand() -> None:
    """Two tokens are 4 and 1 times as likely: their product is 4, its square root 2."""
    new, old = tensor([[4.0, 1.0, 7.0]]).log(), tensor([[1.0, 1.0, 1.0]]).log()
    mask = tensor([[True, True, False]])
    assert_close(RATIOS["token"](new, old, mask), tensor([[4.0, 1.0, 7.0]]))
    assert_close(RATIOS["sequence"](new, old, mask), tensor([[2.0]]))
    assert_close(RATIOS["sequence_product"](new, old, mask), tensor([[4.0]]))


def make_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_surrogate_by_hand() -> None:
    # Ratios 1.5, 0.5, 1.1 with advantage +2: clipped at 1.2 above, never below when positive.
    ratios, unused = tensor([[1.5, 0.5, 1.1], [1.5, 0.5, 1.1]]), torch.zeros(2, 3)
    loss, clipped = clipped_surrogate(ratios, unused, tensor([[2.0], [-2.0]]))
    assert_close(loss, tensor([[-2.4, -1.0, -2.2], [3.0, 1.6, 2.2]]))
    assert clipped.tolist() == [[True, False, False], [False, True, False]]


def test_the_clip_may_be_wider_above_and_end_where_the_advantage_is_negative() -> None:
    ratios, unused = tensor([[1.5, 1.25]]), torch.zeros(1, 2)
    loss, _ = clipped_surrogate(ratios, unused, tensor([[1.0]]), clip_high=0.3)
    assert_close(loss, tensor([[-1.3, -1.25]]))
    ratios = tensor([[5.0, 2.0, 0.5]])
    loss, clipped = clipped_surrogate(ratios, ratios, tensor([[-1.0]]), clip_dual=3.0)
    assert_close(loss, tensor([[3.0, 2.0, 0.8]]))
    assert clipped.tolist() == [[True, False, True]]


def test_the_other_losses_by_hand() -> None:
    logprobs, ratio = tensor([[-1.0, -2.0]]), tensor([[8.0, 0.5]])
    assert_close(clipped_weight(ratio, logprobs, tensor([[2.0]])).loss, tensor([[10.0, 2.0]]))
    assert_close(policy_gradient(ratio, logprobs, tensor([[2.0]])).loss, tensor([[2.0, 4.0]]))
    # sigmoid(0) = 1/2, times 4: at ratio 1 the gate is 2; at ratio 2 it is 4 · sigmoid(1).
    gate = sigmoid_gated(tensor([[1.0, 2.0]]), logprobs, tensor([[1.0]])).loss
    assert_close(gate, tensor([[-2.0, -4 * 0.7310586]]))
    # w = 1 weighs 1; w = 2 with power 2 and decay 3 weighs 4 · e^-3.
    weighed = gamma_weight(tensor([[1.0], [2.0]]), tensor([[-1.0], [-1.0]]), tensor([[1.0], [1.0]]))
    assert_close(weighed.loss, tensor([[1.0], [4 * math.exp(-3)]]))


LOSSES = {
    "clip": clipped_surrogate,
    "vespo": gamma_weight,
    "cispo": clipped_weight,
    "sapo": sigmoid_gated,
    "gradient": policy_gradient,
}


@pytest.mark.parametrize("name", LOSSES)
def test_on_policy_every_loss_has_the_policy_gradient(name: str) -> None:
    """At ratio 1 the gradient of every loss is -advantage · ∇ log p."""
    logprobs = tensor([[-1.0, -2.0]], requires_grad=True)
    ratio = torch.exp(logprobs - logprobs.detach())
    loss, clipped = LOSSES[name](ratio, logprobs, tensor([[3.0]]))
    loss.sum().backward()
    assert_close(logprobs.grad, tensor([[-3.0, -3.0]]))
    assert not clipped.any()


def test_a_clipped_token_has_no_gradient_and_a_weighed_one_has() -> None:
    for function, expected in ((clipped_surrogate, 0.0), (clipped_weight, -5.0)):
        logprobs = tensor([[math.log(8.0)]], requires_grad=True)
        loss, clipped = function(logprobs.exp(), logprobs, tensor([[1.0]]))
        loss.sum().backward()
        assert clipped.item()
        assert logprobs.grad is not None
        assert logprobs.grad.item() == expected


def make_tokens(*lengths: int, minibatch: list[int] | None = None, longest: int = 4) -> Tokens:
    mask_NC = torch.arange(max(lengths)) < tensor(lengths)[:, None]
    return Tokens(mask_NC, tensor(minibatch or [0] * len(lengths)), longest)


@pytest.mark.parametrize(
    ("averaging", "expected"),
    [
        ("sequence_mean", [[1 / 8, 1 / 8, 1 / 8, 1 / 8], [1 / 2, 0, 0, 0]]),
        ("token_mean", [[1 / 5, 1 / 5, 1 / 5, 1 / 5], [1 / 5, 0, 0, 0]]),
        ("constant", [[1 / 20, 1 / 20, 1 / 20, 1 / 20], [1 / 20, 0, 0, 0]]),
        ("sequence_sum", [[1 / 2, 1 / 2, 1 / 2, 1 / 2], [1 / 2, 0, 0, 0]]),
        ("minibatch_token_mean", [[1 / 8, 1 / 8, 1 / 8, 1 / 8], [1 / 2, 0, 0, 0]]),
    ],
)
def test_weights_by_hand(averaging: str, expected: list[list[float]]) -> None:
    """Weights completions of 4 tokens and of 1, with max_tokens 10, each in its own minibatch."""
    found = AVERAGINGS[averaging](make_tokens(4, 1, minibatch=[0, 1], longest=10))
    assert_close(found, tensor(expected))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_sequence_weights_are_the_mean_of_the_means(lengths: list[int]) -> None:
    tokens = make_tokens(*lengths)
    values_NC = torch.rand(tokens.mask_NC.shape)
    mean_of_means = torch.stack(
        [row[:length].mean() for row, length in zip(values_NC, lengths, strict=True)]
    ).mean()
    assert_close((AVERAGINGS["sequence_mean"](tokens) * values_NC).sum(), mean_of_means)


def test_the_least_certain_tokens_by_hand() -> None:
    """Of 0.1 0.2 0.3 0.4 0.5, the upper two fifths are those above the 0.6-quantile, 0.34."""
    entropy, mask = tensor([[0.1, 0.5, 0.3], [0.2, 0.4, 9.0]]), make_tokens(3, 2).mask_NC
    chosen = top_entropy_mask(entropy, mask, 0.4)
    assert chosen.tolist() == [[False, True, False], [False, True, False]]
    assert torch.equal(top_entropy_mask(entropy, mask, 1.0), mask)
