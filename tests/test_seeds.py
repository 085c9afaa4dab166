"""Seeds of any size give streams of their own, and small ones the numbers that they always gave."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.data.order import order_mix, order_one_set
from grpo.errors import ConfigError
from grpo.seeds import SEED_LIMIT, derive_seed
from grpo.sweep.study import SearchOptions
from grpo.training.minibatches import assign_minibatches

Grpo = Callable[..., tuple[int, str]]
LARGE = [2**31, 2**32, 20_301_231_235_959, 2**63, SEED_LIMIT - 1]


@given(st.integers(0, 2**31 - 1), st.integers(0, 10**9))
def test_small_seeds_are_the_product_that_they_were(seed: int, number: int) -> None:
    assert derive_seed(seed, number) == seed * 1_000_003 + number


def test_streams_differ_in_what_a_generator_gives() -> None:
    """On a CPU it reads 32 bits of a seed alone, so it is not enough that the seeds differ."""
    draws = set()
    for seed in (0, 1, *LARGE):
        for number in (0, 1, 2):
            generator = torch.Generator().manual_seed(derive_seed(seed, number))
            draws.add(tuple(torch.rand(4, generator=generator).tolist()))
    assert len(draws) == 3 * (2 + len(LARGE))


@pytest.mark.parametrize("seed", LARGE)
def test_every_order_and_split_takes_a_large_seed(seed: int) -> None:
    assert sorted(order_one_set(9, seed).draw_rows(0, 9)) == list(range(9))
    drawn = order_mix(["a", "b"] * 4, {"a": 0.5, "b": 0.5}, seed).draw_rows(0, 40)
    assert set(drawn) == set(range(8))
    assert sorted(assign_minibatches(6, 3, seed + 5).tolist()) == [0, 0, 1, 1, 2, 2]


def build_options(**options: object) -> SearchOptions:
    usual = {
        "sampler": "tpe", "sampler_options": {}, "pruner": "none", "pruner_options": {},
        "direction": "maximize", "objectives": None, "storage": None, "study_name": None,
        "n_trials": 3, "n_jobs": 1, "seed": 0,
    }  # fmt: skip
    return SearchOptions.from_config({**usual, **options})


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes"])
@pytest.mark.parametrize("seed", [4_294, 4_295, *LARGE])
def test_a_search_takes_a_large_seed(sampler: str, seed: int) -> None:
    import optuna

    def ask_first() -> float:
        study = optuna.create_study(
            sampler=build_options(sampler=sampler, seed=seed).make_sampler(1)
        )
        return float(study.ask().suggest_float("x", 0, 1))

    assert ask_first() == ask_first()


@pytest.mark.parametrize("key", ["seed", "n_trials", "n_jobs"])
def test_a_search_refuses_what_no_library_takes(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"hydra\.sweeper\.{key}={10**20}: must be a whole"):
        build_options(**{key: 10**20})


def test_a_run_takes_a_date_and_time_for_a_seed(grpo: Grpo) -> None:
    job = ("experiment=smoke", "tracking=none", "max_steps=1", "batch_size=2", "eval.every=0")
    sizes = ("dataset.size=20", "dataset.eval_size=4", "algorithm.minibatches=2", "adapter=lora")
    code, printed = grpo(*job, *sizes, "seed=20301231235959")
    assert code == 0, printed


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("seed=18446744073709551616", "seed=18446744073709551616: must be less than 2**64"),
        ("seed=-3", "seed=-3: must be at least 0"),
        ("batch_size=3000000000", "batch_size=3000000000: must be at most 2147483647"),
        ("max_steps=99999999999999999999", "must be at most 2147483647"),
        ("num_generation=70000000", "batch_size=16 num_generation=70000000 max_new_tokens=48: "),
        ("eval.samples=90000000", "eval.samples=90000000 max_new_tokens=48: "),
        ("dataset.max_prompt_tokens=5000000000", "dataset.max_prompt_tokens=5000000000: "),
    ],
)
def test_numbers_beyond_what_is_taken_are_refused(override: str, reason: str, grpo: Grpo) -> None:
    code, printed = grpo(override)
    assert code == 2
    assert printed.count("\n") == 1
    assert reason in printed
