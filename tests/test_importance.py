"""Corrections for what another sampler wrote: numbers by hand, and TRL's own mask."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl import GRPOTrainer

from grpo.objective import RATIOS, OffPolicyCorrection
from grpo.objective.importance import chi_squared, effective_share

SAMPLER_NC = torch.zeros(2, 3)
MASK_NC = torch.tensor([[True, True, True], [True, True, False]])
# Policy / sampler: 4, 1/2, 1 and 1/10, 2 (and a place beyond the end, which must not count).
OLD_NC = torch.tensor([[4.0, 0.5, 1.0], [0.1, 2.0, 77.0]]).log()


def weigh(level: str, outside: str, low: float, high: float) -> list[list[float]]:
    correction = OffPolicyCorrection(RATIOS[level], low, high, outside)
    weights = correction.weigh(OLD_NC, SAMPLER_NC, MASK_NC).expand(2, 3)
    return [row[kept].tolist() for row, kept in zip(weights, MASK_NC, strict=True)]


@pytest.mark.parametrize(
    ("level", "outside", "low", "high", "expected"),
    [
        ("token", "truncate", 0.0, 2.0, [[2, 0.5, 1], [0.1, 2]]),
        ("token", "truncate", 0.5, 3.0, [[3, 0.5, 1], [0.5, 2]]),
        ("token", "mask", 0.5, 2.0, [[0, 0.5, 1], [0, 2]]),  # IcePop; a bound itself is kept
        ("sequence_product", "truncate", 0.5, 1.5, [[1.5] * 3, [0.5] * 2]),  # 2 and 0.2
        ("sequence_product", "mask", 0.0, 1.5, [[0] * 3, [0.2] * 2]),
        ("sequence", "truncate", 0.0, 9.0, [[2 ** (1 / 3)] * 3, [0.2**0.5] * 2]),
        ("sequence", "mask", 0.5, 9.0, [[2 ** (1 / 3)] * 3, [0] * 2]),
        ("token", "truncate", 1.0, 1.0, [[1] * 3, [1] * 2]),  # no correction
    ],
)
def test_weights_worked_out_by_hand(
    level: str, outside: str, low: float, high: float, expected: list[list[float]]
) -> None:
    for row, wanted in zip(weigh(level, outside, low, high), expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-5)


@given(st.integers(0, 2**31), st.floats(0.01, 2.0))
def test_completions_are_left_out_as_by_trl(seed: int, limit: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logprobs_NC, sampler_NC = (torch.randn(5, 4, generator=generator) for _ in range(2))
    lengths_N1 = torch.randint(1, 5, (5, 1), generator=generator)
    mask_NC = torch.arange(4) < lengths_N1
    advantages_N1 = torch.randint(-1, 2, (5, 1), generator=generator).float()
    correction = OffPolicyCorrection(max_sequence_kl=limit)
    kept_N1 = correction.keep(logprobs_NC, sampler_NC, mask_NC, advantages_N1)
    trls = GRPOTrainer.get_off_policy_mask(
        advantages_N1, logprobs_NC, sampler_NC, mask_NC.float(), limit
    )
    assert kept_N1.tolist() == trls.bool().tolist()


def test_only_bad_completions_that_became_unlikely_are_left_out() -> None:
    """The first row's tokens lost ln 2 nats on average, the second's, with one token, ln 3."""
    logprobs_NC = torch.tensor([[0.25, 1.0], [1 / 3, 9.0]]).log()
    mask_NC = torch.tensor([[True, True], [True, False]])
    for limit, advantage, expected in (
        (1.0, -1.0, [True, False]), (0.6, -1.0, [False, False]), (0.6, 1.0, [True, True]),
        (0.6, 0.0, [True, True]), (2.0, -1.0, [True, True]),
    ):  # fmt: skip
        kept_N1 = OffPolicyCorrection(max_sequence_kl=limit).keep(
            logprobs_NC, torch.zeros(2, 2), mask_NC, torch.full((2, 1), advantage)
        )
        assert kept_N1[:, 0].tolist() == expected
    everything = OffPolicyCorrection().keep(
        logprobs_NC, torch.zeros(2, 2), mask_NC, torch.full((2, 1), -1.0)
    )
    assert everything.all()


def test_how_far_a_sampler_is() -> None:
    """Weights 1 and 3: mean 2, mean square 5."""
    log_weights_T = torch.tensor([1.0, 3.0]).log()
    assert effective_share(log_weights_T) == pytest.approx(4 / 5)
    assert chi_squared(log_weights_T) == pytest.approx(4.0)
    assert effective_share(torch.zeros(7)) == 1.0
    assert chi_squared(torch.zeros(7)) == 0.0


@given(st.lists(st.floats(-30, 30), min_size=1))
def test_the_effective_share_is_one_at_most(log_weights: list[float]) -> None:
    share = effective_share(torch.tensor(log_weights))
    assert 1 / len(log_weights) - 1e-6 <= share <= 1 + 1e-6
    assert math.isfinite(chi_squared(torch.tensor(log_weights)))
