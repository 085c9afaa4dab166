"""Processes that divide the weights among them compute what one does, and save for any number."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from grpo.models.sharded import find_first_row, get_local_part, select_local_part
from grpo.parallel.process_group import ProcessGroup
from grpo.training.divided_state import fill_divided, list_tensors, separate_divided
from grpo.training.optimizer import sample_indices, select_local_indices
from tests.conftest import read_metrics, read_summary, run_grpo
from tests.test_ranks import (
    DIAGONAL,
    LINUX,
    SHORT,
    check_equal_to_one,
    count_rank_processes,
    read_own_metrics,
)

FSDP = ("parallel=fsdp", "parallel.processes=2")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
CASES = [  # KLs of each kind, adapters, moving references, minibatches, passes without a gradient
    ("kl_weight=0.1", "device.token_budget=60", "algorithm.top_entropy=0.3"),
    ("adapter=lora", "adapter.rank=2", "learning_rate=1e-4", "kl_weight=0.1", "kl.sync_every=2"),
]
MORE_CASES = [
    ("kl_weight=0.1", "kl=full", "algorithm.minibatches=2", "algorithm.num_iterations=2"),
    ("kl_weight=0.1", "kl.sync_every=2", "kl.sync_share=0.5"),
    ("kl_weight=0.1", "device.gradient_checkpointing=true"),
    ("algorithm.minibatches=2", "sampling.top_k=20", "device.token_budget=60"),
    ("curriculum.samples=2", "curriculum.order=hard_first", "dataset.slice=:12"),
    ("algorithm.entropy_weight=0.01", "algorithm.resample=2", "learning_rate=1e-4"),
]


@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_two_sharded_ranks_equal_one(
    overrides: tuple[str, ...], ranks: ProcessGroup, tmp_path: Path
) -> None:
    check_equal_to_one(("parallel=fsdp", *overrides), ranks, tmp_path, plain=True)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3], indirect=True)
@pytest.mark.parametrize("overrides", DIAGONAL + MORE_CASES, ids=" ".join)
def test_three_sharded_ranks_equal_one(
    overrides: tuple[str, ...], ranks: ProcessGroup, tmp_path: Path
) -> None:
    check_equal_to_one(("parallel=fsdp", *overrides), ranks, tmp_path, plain=True)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of four steps, and of two: by one process, and by two that divide the weights."""
    folder = tmp_path_factory.mktemp("halves")
    common = (*SHORT[:-1], "eval.every=2", "device.precision=fp32")
    for name, parallel in {"one": (), "fsdp": FSDP}.items():
        for steps in (4, 2):
            done = run_grpo(
                *common, *parallel, f"max_steps={steps}", f"hydra.run.dir={name}_{steps}",
                cwd=folder, env=ONE_THREAD,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "parallel"),
    [
        ("fsdp_2", FSDP),
        ("fsdp_2", ("parallel=fsdp", "parallel.processes=3")),
        ("fsdp_2", ("parallel=none",)),
        ("fsdp_2", ("parallel=ddp", "parallel.processes=2")),
        ("one_2", FSDP),
    ],
)
def test_any_number_of_processes_resumes(
    saved: str, parallel: tuple[str, ...], halves: Path, tmp_path: Path
) -> None:
    shutil.copytree(halves / saved, tmp_path / "run", symlinks=True)
    done = run_grpo("resume=run", "max_steps=4", *parallel, cwd=tmp_path, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    found = read_own_metrics(tmp_path / "run")
    if (saved, parallel) == ("fsdp_2", FSDP):
        assert found == read_own_metrics(halves / "fsdp_4")  # to the last bit
    for line, expected in zip(found, read_own_metrics(halves / "one_4"), strict=True):
        moved = line.pop("optim/moved", 0.0), expected.pop("optim/moved", 0.0)
        assert moved[0] == pytest.approx(moved[1], abs=2e-3)
        assert line == pytest.approx(expected, rel=1e-5, abs=2e-5)


@pytest.mark.slow
def test_the_saved_model_is_whole(halves: Path) -> None:
    from transformers import AutoModelForCausalLM

    one, divided = (
        AutoModelForCausalLM.from_pretrained(halves / name / "checkpoints/latest/model")
        for name in ("one_4", "fsdp_4")
    )
    assert type(one) is type(divided)
    for (name, expected), found in zip(one.named_parameters(), divided.parameters(), strict=True):
        assert (expected - found).abs().max() <= 5e-5, name


OWN_REWARD = """
import os, signal
import grpo.training.update

calls = 0

def disturb(samples, how):
    global calls
    calls += 1
    if os.environ.get("RANK") == "1" and calls == 4:  # after two evaluations, in step 2
        if how == "raise":
            raise ValueError("no good")
        grpo.training.update.compute_loss = die if how == "die" else fill_memory
    return [float(len(sample.completion) % 3) for sample in samples]

def die(*inputs):
    os.kill(os.getpid(), signal.SIGKILL)

def fill_memory(*inputs):
    raise MemoryError("can't allocate memory")
"""


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said", "is_saved"),
    [
        ("raise", "step 2: rank 1: reward.own: it raised ValueError: no good", True),
        ("die", "step 2: rank 1 ended by SIGKILL", False),
        ("fill", "step 2: rank 1: out of memory with .* resume with device.token_budget=", False),
    ],
)
def test_a_failure_while_all_compute_together_ends_all(
    how: str, said: str, is_saved: bool, tmp_path: Path
) -> None:
    (tmp_path / "own_reward.py").write_text(OWN_REWARD)
    reward = ("+reward.own._target_=own_reward.disturb", f"+reward.own.how={how}")
    done = run_grpo(*SHORT, *FSDP, *reward, "checkpoint.every=0", cwd=tmp_path, env=ONE_THREAD)
    assert done.returncode == 1
    assert re.search(f"grpo: {said}", done.stderr), done.stderr
    assert (tmp_path / "run/checkpoints/step_1").is_dir() == is_saved
    assert ("is not saved" in done.stderr) != is_saved
    assert read_summary(tmp_path / "run")["status"] == "failed"
    assert len(read_metrics(tmp_path / "run")) == 2
    assert count_rank_processes(tmp_path) == 0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("adapter=qlora",), "adapter.quantized=True: parallel=fsdp can't divide it"),
        (("optim.name=adamw_8bit",), "optim.name=adamw_8bit: parallel=fsdp can't divide it"),
        (("device=cpu", "parallel.offload=true"), "parallel.offload=True: device=cpu has nothing"),
    ],
)
def test_what_can_not_be_divided_is_refused(overrides: tuple[str, ...], said: str, grpo) -> None:
    code, printed = grpo(*FSDP, *overrides)
    assert code == 2
    assert f"grpo: {said}" in printed


def test_only_what_is_divided_can_be_offloaded(grpo) -> None:
    code, printed = grpo("parallel=ddp", "parallel.processes=2", "parallel.offload=true")
    assert code == 2
    assert "grpo: parallel.offload=True: parallel=ddp keeps all on its device" in printed


class Divided:
    """A tensor's rows of one process, with what `sharded` reads of torch's DTensor."""

    def __init__(self, whole: torch.Tensor, rank: int, size: int) -> None:
        chunks = [*whole.chunk(size), *[whole[:0]] * size]
        self.shape, self.local, self.device_mesh = whole.shape, chunks[rank], self
        self.rank, self.processes = rank, size
        self.numel = whole.numel

    def size(self) -> int:
        return self.processes

    def get_local_rank(self) -> int:
        return self.rank

    def detach(self) -> Divided:
        return self

    def to_local(self) -> torch.Tensor:
        return self.local


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_parts_cover_the_whole_once(rows: int, size: int) -> None:
    whole = torch.arange(rows * 3.0).view(rows, 3)
    parts = [Divided(whole, rank, size) for rank in range(size)]
    assert torch.equal(torch.cat([select_local_part(whole, part) for part in parts]), whole)
    assert find_first_row(parts[0]) == 0
    indices_T = sample_indices(whole, 7)
    taken = [torch.take(get_local_part(p), select_local_indices(indices_T, p)) for p in parts]  # type: ignore[arg-type]
    assert torch.equal(torch.cat(taken), torch.take(whole, indices_T))


def test_a_state_without_divided_tensors_stays_as_it_is() -> None:
    layer = nn.Linear(2, 2)
    state = {"a": [layer.weight, {"b": 1}], "c": None}
    rest, divided = separate_divided(state)
    assert divided == {}
    assert rest["a"][0] is layer.weight
    tensors = dict(list_tensors(state))
    assert list(tensors) == ["/a/0"]
    assert fill_divided({"a": [None, {"b": 1}], "c": None}, tensors)["a"][0] is layer.weight
