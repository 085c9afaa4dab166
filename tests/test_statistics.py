"""What a report says of few seeds: against numbers worked out by hand and by other ways."""

from __future__ import annotations

import itertools
import math
from statistics import mean, stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from grpo.report.sweep.statistics import difference, holm, mean_interval, more_seeds, power

values = st.lists(st.floats(0, 1), min_size=2, max_size=6)


def test_the_interval_of_three_seeds_is_that_of_all_their_resamples() -> None:
    """Of the 27 there are of 0, 0.3 and 0.6, one has mean 0: more than 2.5%, so the end is 0."""
    means = sorted(mean(sample) for sample in itertools.product([0.0, 0.3, 0.6], repeat=3))
    assert means[0] == 0.0
    found = mean_interval([0.0, 0.3, 0.6])
    assert found is not None
    assert found.low == pytest.approx(np.quantile(means, 0.025, method="inverted_cdf"))
    assert found.high == pytest.approx(np.quantile(means, 0.975, method="inverted_cdf"))


@given(values)
def test_an_interval_lies_about_its_mean_and_within_its_values(own: list[float]) -> None:
    found = mean_interval(own)
    assert found is not None
    tiny = 1e-9
    assert min(own) - tiny <= found.low <= mean(own) + tiny
    assert mean(own) - tiny <= found.high <= max(own) + tiny


def test_one_seed_has_no_interval() -> None:
    assert mean_interval([0.5]) is None


def test_the_paired_t_test_by_hand() -> None:
    """Differences 0.1, 0.2, 0.3: mean 0.2, deviation 0.1, t = 0.2 / (0.1 / sqrt 3) = 3.4641.

    With 2 degrees of freedom P(|T| > t) = 1 - t / sqrt(t² + 2) = 0.0742.
    """
    found = difference({0: 0.6, 1: 0.6, 2: 0.9}, {0: 0.5, 1: 0.4, 2: 0.6})
    t = 0.2 / (0.1 / math.sqrt(3))
    assert found.mean == pytest.approx(0.2)
    assert found.p == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert found.paired == 3
    assert not found.supported


def test_pairs_see_what_the_seeds_hide() -> None:
    """Seeds differ by 0.3, settings by 0.02, the same on each seed nearly."""
    one = {0: 0.32, 1: 0.621, 2: 0.919, 3: 0.12}
    other = {0: 0.30, 1: 0.600, 2: 0.900, 3: 0.10}
    assert difference(one, other).supported
    apart = difference(one, {seed + 10: value for seed, value in other.items()})
    assert apart.paired == 0
    assert not apart.supported
    assert apart.p == pytest.approx(
        stats.ttest_ind(list(one.values()), list(other.values()), equal_var=False).pvalue
    )


@pytest.mark.parametrize(
    ("one", "other", "p"),
    [
        ({0: 0.5}, {0: 0.4}, 1.0),  # one seed says nothing
        ({0: 0.5, 1: 0.5}, {0: 0.4, 1: 0.4}, 0.0),  # no chance in it
        ({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6}, 1.0),
    ],
)
def test_the_ends(one: dict[int, float], other: dict[int, float], p: float) -> None:
    assert difference(one, other).p == p


def test_so_many_more_seeds_would_settle_it() -> None:
    """At that many the power is four in five, at one fewer it is not; checked by simulation."""
    differences = [0.1, 0.2, 0.3, -0.05]
    more = more_seeds(differences)
    assert more is not None
    pairs = len(differences) + more
    effect = mean(differences) / stdev(differences)
    assert power(effect, pairs) >= 0.8 > power(effect, pairs - 1)
    rng = np.random.default_rng(0)
    drawn = rng.normal(effect, 1, (20_000, pairs))
    share = float((stats.ttest_1samp(drawn, 0, axis=1).pvalue <= 0.05).mean())
    assert share == pytest.approx(power(effect, pairs), abs=0.01)


@pytest.mark.parametrize(("effect", "pairs"), [(29.9, 2), (30.1, 2), (15, 4), (4, 60), (8, 1000)])
def test_the_power_of_a_large_effect(effect: float, pairs: int) -> None:
    """Where scipy's own distribution has no number any more; checked by simulation."""
    rng = np.random.default_rng(0)
    drawn = rng.normal(effect, 1, (10_000, pairs))
    share = float((stats.ttest_1samp(drawn, 0, axis=1).pvalue <= 0.05).mean())
    assert power(effect, pairs) == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize(("effect", "pairs"), [(0.3, 3), (0.8, 5), (0.5, 30), (0.1, 200)])
def test_the_power_is_that_of_the_noncentral_t(effect: float, pairs: int) -> None:
    critical, shift = stats.t.ppf(0.975, pairs - 1), effect * math.sqrt(pairs)
    t = stats.nct(pairs - 1, shift)
    assert power(effect, pairs) == pytest.approx(t.sf(critical) + t.cdf(-critical), abs=1e-3)


def test_no_number_of_seeds_settles_no_difference() -> None:
    assert more_seeds([0.1, -0.1]) is None
    assert more_seeds([0.2, 0.2]) == 0


def test_holm_by_hand() -> None:
    """0.01·3 = 0.03; 0.03·2 = 0.06; 0.04·1 = 0.04, but not below 0.06."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]
