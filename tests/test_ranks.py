"""Several processes compute what one does, end together, and say which of them was at fault."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo.parallel.process_group import ProcessGroup
from grpo.parallel.start import started_ranks
from tests.rank_cases import end_cases, run_case

CASES = Path(__file__).parents[1] / "conf" / "algorithm"
ALGORITHMS = sorted(file.stem for file in CASES.glob("*.yaml"))
KLS = {
    "none": ("kl_weight=0",),
    "loss": ("kl_weight=0.1",),
    "exact": ("kl_weight=0.1", "kl=full"),
    "reward": ("kl_weight=0.1", "kl.within=reward"),
}
ADAPTERS = {"all weights": (), "lora": ("adapter=lora", "adapter.rank=2", "learning_rate=1e-4")}
RESAMPLING = {"kept": ("algorithm.resample=0",), "resampled": ("algorithm.resample=2",)}

# Each algorithm, KL, adapter and resampling; then what decides by a whole step's values.
SOME = [
    (*KLS[kl], f"algorithm={name}", *ADAPTERS[adapter], *RESAMPLING[resampling])
    for name, (kl, adapter, resampling) in zip(
        ALGORITHMS, itertools.cycle(itertools.product(KLS, ADAPTERS, RESAMPLING)), strict=False
    )
]
SPECIAL = [
    ("algorithm.top_entropy=0.3",),
    ("algorithm.minibatches=2", "algorithm.num_iterations=2"),
    ("algorithm.minibatches=2", "sampling.top_k=20", "sampling.top_p=0.9"),
    ("algorithm.aggregate=normalize_then_sum", "reward=answer_format"),
    ("algorithm.scale=batch_std", "algorithm.baseline=batch_mean"),
    ("algorithm.mask_truncated=true", "max_new_tokens=21"),
    ("algorithm.entropy_weight=0.01", "algorithm.averaging=token_mean"),
    ("kl.target=0.01", "kl.horizon=100"),
    ("kl.sync_every=2", "kl.sync_share=0.5"),
    ("curriculum.samples=2", "curriculum.order=hard_first", "dataset.slice=:12"),
    ("batch_size=2",),  # fewer prompts than some of the ranks
    ("device.token_budget=60",),  # many micro-batches, of parts of groups
]


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[ProcessGroup]:
    yield from start_cases(2)


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[ProcessGroup]:
    yield from start_cases(4)


def start_cases(processes: int) -> Iterator[ProcessGroup]:
    with started_ranks(processes, "tests.rank_cases") as ranks:
        yield ranks
        end_cases(ranks)
        ranks.leave()


def check_equal_to_one(overrides: tuple[str, ...], ranks: ProcessGroup, folder: Path) -> None:
    metrics, weights = run_case(overrides, folder / "one")
    found, found_weights = run_case(overrides, folder / "several", ranks)
    assert len(metrics) == 6
    for expected, line in zip(metrics, found, strict=True):
        # A share of 4096 weights, some of which move by about the least that fp32 can.
        moved = line.pop("optim/moved", 0.0), expected.pop("optim/moved", 0.0)
        assert moved[0] == pytest.approx(moved[1], abs=2e-3)
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert weights.keys() == found_weights.keys()
    for name, weight in weights.items():
        assert (weight - found_weights[name]).abs().max() <= 1e-5, name


@pytest.mark.parametrize("overrides", SOME + SPECIAL, ids=" ".join)
def test_two_ranks_equal_one(
    overrides: tuple[str, ...], two_ranks: ProcessGroup, tmp_path: Path
) -> None:
    check_equal_to_one(overrides, two_ranks, tmp_path)
