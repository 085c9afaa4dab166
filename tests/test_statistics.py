"""Statistics of few seeds, checked by hand, by other implementations and by simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from grpo.report.sweep.statistics import (
    MAX_STRICTNESS,
    compare_settings,
    detectable_difference,
    evaluation_variance,
    mean_interval,
    p_of_pair,
)


def test_students_interval_by_hand() -> None:
    """0, 0.3, 0.6: mean 0.3, deviation 0.3; t of 2 degrees is 4.3027, so 4.3027 · 0.3 / sqrt 3."""
    found = mean_interval([0.0, 0.3, 0.6])
    assert found is not None
    assert found.low == pytest.approx(0.3 - 0.7452, abs=1e-4)
    assert found.high == pytest.approx(0.3 + 0.7452, abs=1e-4)


def test_two_seeds_that_agree_are_not_certain() -> None:
    """12 of 16, twice: (24 + 2) / 36 = 0.7222, its error over 32 is 0.0792; 2/3 of it + 1/32."""
    found = mean_interval([0.75, 0.75], answer_count=16)
    assert found is not None
    assert found.high - 0.75 == pytest.approx(2 / 3 * 0.07918 + 1 / 32, abs=1e-4)
    assert 0.75 - found.low == pytest.approx(found.high - 0.75)


def test_a_share_lies_between_0_and_1() -> None:
    found = mean_interval([0.9, 1.0], answer_count=100)
    assert found is not None
    assert found.high == 1.0
    assert found.low == pytest.approx(0.95 - 12.7062 * 0.05, abs=1e-4)


def test_one_seed_has_no_interval() -> None:
    assert mean_interval([0.5]) is None


def test_two_settings_are_compared_by_the_paired_t_test() -> None:
    """Differences 0.1, 0.2, 0.3: mean 0.2, deviation 0.1, t = 0.2 / (0.1 / sqrt 3) = 3.4641.

    With 2 degrees of freedom P(|T| > t) = 1 - t / sqrt(t² + 2) = 0.0742. The range test of two is
    the same test.
    """
    found = compare_settings([{0: 0.6, 1: 0.6, 2: 0.9}, {0: 0.5, 1: 0.4, 2: 0.6}])
    t = 0.2 / (0.1 / math.sqrt(3))
    assert found.adjusted_means == pytest.approx([0.7, 0.5])
    assert found.freedom == 2
    assert found.p(0, 1) == pytest.approx(1 - t / math.sqrt(t * t + 2), abs=1e-4)
    assert not found.is_significant(0, 1)


def test_pairs_see_what_the_seeds_hide() -> None:
    """Seeds differ by 0.3, settings by 0.02, nearly the same on each seed."""
    one = {0: 0.32, 1: 0.621, 2: 0.919, 3: 0.12}
    other = {0: 0.30, 1: 0.600, 2: 0.900, 3: 0.10}
    assert compare_settings([one, other]).is_significant(0, 1)
    elsewhere = {seed + 10: value for seed, value in other.items()}
    assert not compare_settings([one, elsewhere]).is_significant(0, 1)
    welch = stats.ttest_ind(list(one.values()), list(other.values()), equal_var=False).pvalue
    assert p_of_pair(one, elsewhere, 0)[0] == pytest.approx(welch)


@given(st.lists(st.integers(2, 5), min_size=2, max_size=5), st.integers(0, 1000))
def test_without_common_seeds_it_is_tukeys_range_test(counts: list[int], draw: int) -> None:
    """With unequal counts it is Kramer's; scipy gives the same numbers."""
    rng = np.random.default_rng(draw)
    groups = [rng.normal(0, 1, count) for count in counts]
    found = compare_settings(
        [{100 * n + k: float(y) for k, y in enumerate(g)} for n, g in enumerate(groups)]
    )
    expected = stats.tukey_hsd(*groups).pvalue
    range_only = stats.studentized_range.sf(
        found.studentized_difference(0, 1), len(counts), found.freedom
    )
    assert range_only == pytest.approx(expected[0, 1], abs=1e-6)
    assert found.p(0, 1) >= expected[0, 1] - 1e-6


def test_a_missing_seed_changes_no_order() -> None:
    """The second is ahead by 0.1 on both shared seeds; the first lacks the hard seed."""
    first, second = {0: 0.6, 1: 0.8}, {0: 0.7, 1: 0.9, 2: 0.2}
    found = compare_settings([first, second])
    assert np.mean(list(first.values())) > np.mean(list(second.values()))
    assert found.adjusted_means[1] - found.adjusted_means[0] == pytest.approx(0.1)


@pytest.mark.parametrize("trials", [0, 16, 512])
def test_differences_that_happen_to_be_equal_prove_nothing(trials: int) -> None:
    found = compare_settings([{0: 0.5, 1: 0.5}, {0: 0.4, 1: 0.4}], trials)
    assert found.p(0, 1) > 0.05
    assert not found.is_significant(0, 1)


def test_no_variance_is_below_the_evaluations() -> None:
    """0.5 of 100 answers: 52 / 104 · 52 / 104 / 100."""
    assert evaluation_variance(0.5, 100) == pytest.approx(0.0025)
    assert evaluation_variance(1.0, 4) == pytest.approx(6 / 8 * 2 / 8 / 4)
    found = compare_settings([{0: 0.5, 1: 0.5}, {0: 0.5, 1: 0.5}], 100)
    assert found.variance == pytest.approx(0.0025)


@given(
    st.lists(
        st.dictionaries(st.integers(0, 4), st.floats(0, 1).map(lambda x: round(x, 3)), min_size=2),
        min_size=2, max_size=6,
    ),
    st.sampled_from([0, 64]),
)  # fmt: skip
def test_p_and_told_agree_and_have_no_direction(settings: list[dict[int, float]], n: int) -> None:
    found = compare_settings(settings, n)
    assert 0 <= found.p(0, 1) <= 1
    assert found.p(0, 1) == pytest.approx(found.p(1, 0))
    if abs(found.p(0, 1) - 0.05) > 1e-4:
        assert found.is_significant(0, 1) == (found.p(0, 1) <= 0.05)


def draw(
    rng: np.random.Generator,
    means: Sequence[float],
    seeds: int,
    trials: int,
    spread: float,
    unequal: bool = False,
) -> list[dict[int, float]]:
    """Draws a sweep: training noise, seeds that are harder for all, binomial evaluation."""
    shared = rng.normal(0, spread, seeds)
    settings = []
    for mean in means:
        chances: NDArray[np.float64] = np.clip(mean + shared + rng.normal(0, spread, seeds), 0, 1)
        values = rng.binomial(trials, chances) / trials
        settings.append(dict(enumerate(values.tolist())))
    if unequal:  # a job in five failed, but none of a setting's first two
        for by_seed in settings:
            for seed in [seed for seed in by_seed if seed > 1 and rng.random() < 0.2]:
                del by_seed[seed]
    return settings


# So many samples make up an evaluation; a simulation for each.
SAMPLES = (16, 128, 1024, 4096)
SEEDS = (2, 3, 5, 10)


def measure_coverage(seeds: int, samples: int, spread: float, times: int = 4000) -> float:
    """Returns the coverage of a mean's interval, with true means between 0.1 and 0.9."""
    rng, hits = np.random.default_rng(seeds + samples), 0
    for _ in range(times):
        mean = rng.uniform(0.1, 0.9)
        chances = np.clip(mean + rng.normal(0, spread, seeds), 0, 1)
        values = rng.binomial(samples, chances) / samples
        found = mean_interval(values.tolist(), samples)
        assert found is not None
        hits += found.low <= mean <= found.high
    return hits / times


@pytest.mark.parametrize("spread", [0.0, 0.03])
@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("seeds", SEEDS)
def test_an_interval_holds_the_mean_as_often_as_it_says(
    seeds: int, samples: int, spread: float
) -> None:
    assert 0.93 <= measure_coverage(seeds, samples, spread) <= 0.97


def measure_errors(
    settings: int,
    seeds: int,
    samples: int,
    spread: float,
    unequal: bool,
    better: float,
    times: int,
) -> tuple[float, float, float]:
    """Returns three shares: sweeps in which the best is told from a setting that is no worse;
    sweeps in which it is told from one that is better; other settings the true best is told from.

    better: how much one setting is ahead of the rest, in standard errors of a difference.
    """
    rng = np.random.default_rng([settings, seeds, samples, unequal])
    error = math.sqrt(2 * (0.7 * 0.3 / samples + spread**2) / seeds)
    means = np.full(settings, 0.7)
    means[0] += better * error
    equal = wrong = hits = 0
    for _ in range(times):
        found = compare_settings(
            draw(rng, means.tolist(), seeds, samples, spread, unequal), samples
        )
        best = int(np.argmax(found.adjusted_means))
        distinct = [n for n in range(settings) if n != best and found.is_significant(best, n)]
        equal += any(means[n] == means[best] for n in distinct)
        wrong += any(means[n] > means[best] for n in distinct)
        hits += len(distinct) if best == 0 else 0
    return equal / times, wrong / times, hits / times / (settings - 1)


@pytest.mark.parametrize("unequal", [False, True], ids=["equal", "unequal"])
@pytest.mark.parametrize("samples", [16, 4096, pytest.param(512, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("settings", "seeds"),
    [(2, 3), (6, 2), (6, 5)]
    + [
        pytest.param(settings, seeds, marks=pytest.mark.slow)
        for settings in (2, 6, 24)
        for seeds in SEEDS
        if (settings, seeds) not in ((2, 3), (6, 2), (6, 5))
    ],
)
def test_settings_are_told_apart_no_more_often_than_they_may(
    settings: int, seeds: int, samples: int, unequal: bool
) -> None:
    """The standard error with 600 sweeps is 0.9%; docs/statistics.md has the full tables."""
    for spread in (0.0, 0.02):
        equal, wrong, _ = measure_errors(settings, seeds, samples, spread, unequal, 0.0, 600)
        assert equal <= 0.07
        assert wrong == 0
        equal, wrong, _ = measure_errors(settings, seeds, samples, spread, unequal, 2.0, 200)
        assert equal <= 0.07
        assert wrong <= 0.025


def test_so_much_of_a_difference_is_told_four_times_in_five() -> None:
    for settings, seeds in ((2, 5), (6, 3), (6, 5)):
        least = detectable_difference(0.02, settings, seeds)
        rng, detected = np.random.default_rng(0), 0
        for _ in range(1000):
            values = rng.normal(0.5, 0.02, (settings, seeds))
            values[0] += least
            detected += compare_settings(
                [dict(enumerate(row.tolist())) for row in values]
            ).is_significant(0, 1)
        assert 0.72 <= detected / 1000 <= 0.85, (settings, seeds, detected)


def test_one_that_varies_more_is_not_told_apart_by_the_others_spread() -> None:
    """Six equal settings, one of them five times as noisy: a common variance would give 12%."""
    rng, detected = np.random.default_rng(0), 0
    for _ in range(1500):
        values = rng.normal(0.5, [[0.05]] + [[0.01]] * 5, (6, 5))
        found = compare_settings([dict(enumerate(row.tolist())) for row in values])
        best = int(np.argmax(found.adjusted_means))
        detected += any(found.is_significant(best, n) for n in range(6) if n != best)
    assert detected / 1500 <= 0.06
    assert MAX_STRICTNESS == 2.5  # as docs/statistics.md says


def main() -> None:
    """Prints the tables of docs/statistics.md; takes half an hour."""
    for spread in (0.0, 0.03):
        for seeds in SEEDS:
            shares = [measure_coverage(seeds, samples, spread, 20_000) for samples in SAMPLES]
            print(f"coverage, spread {spread}, {seeds} seeds:", *(f"{x:.1%}" for x in shares))
    for settings, seeds, unequal in product((2, 6, 24), SEEDS, (False, True)):
        runs = [
            measure_errors(settings, seeds, samples, spread, unequal, better, 2000)
            for samples, spread in product((16, 512, 4096), (0.0, 0.02))
            for better in (0.0, 2.0)
        ]
        power = [hits for _, _, hits in runs[1::2]]
        print(
            f"{settings} settings, {seeds} seeds{', some missing' if unequal else ''}: "
            f"told without a difference {max(run[0] for run in runs):.1%}, the wrong way "
            f"{max(run[1] for run in runs):.1%}, power {min(power):.0%} to {max(power):.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
