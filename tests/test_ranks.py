"""Several processes compute what one does, end together, and say which of them was at fault."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import grpo.models.load
import grpo.models.recompute
from grpo.parallel import divide_by_cost
from grpo.parallel.interface import find_interface
from grpo.parallel.messages import pack, unpack
from grpo.parallel.process_group import ProcessGroup, collect_buckets
from tests.conftest import copy_environment, read_metrics, read_summary, run_grpo, wait_for_step
from tests.rank_cases import MEASURED, run_case

ROOT = Path(__file__).parents[1]
ALGORITHMS = sorted(file.stem for file in (ROOT / "conf" / "algorithm").glob("*.yaml"))
KLS = {
    "none": ("kl_weight=0",),
    "loss": ("kl_weight=0.1",),
    "exact": ("kl_weight=0.1", "kl=full"),
    "reward": ("kl_weight=0.1", "kl.within=reward"),
}
ADAPTERS = {"all weights": (), "lora": ("adapter=lora", "adapter.rank=2", "learning_rate=1e-4")}
RESAMPLING = {"kept": ("algorithm.resample=0",), "resampled": ("algorithm.resample=2",)}
PRODUCT = [
    (f"algorithm={name}", *KLS[kl], *ADAPTERS[adapter], *RESAMPLING[resampling])
    for name, kl, adapter, resampling in itertools.product(ALGORITHMS, KLS, ADAPTERS, RESAMPLING)
]
# Every algorithm, and with a stride that has no factor in common with the 16 others, all of these.
DIAGONAL = [PRODUCT[16 * n + 5 * n % 16] for n in range(len(ALGORITHMS))]
BY_WHOLE_STEP = [  # what is decided by the values of all prompts together
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
    ("device.token_budget=60",),  # many micro-batches, of parts of groups
]
USUAL = [
    ("algorithm=dapo", "kl_weight=0.1", "adapter=lora", "adapter.rank=2", "learning_rate=1e-4"),
    ("algorithm.minibatches=2", "algorithm.num_iterations=2", "kl_weight=0.1", "kl=full"),
    ("algorithm.top_entropy=0.3", "kl_weight=0.1", "kl.within=reward", "algorithm.resample=2"),
]


def check_equal_to_one(
    overrides: tuple[str, ...], ranks: ProcessGroup, folder: Path, plain: bool = False
) -> None:
    """plain: one process, too, computes with transformers' modules alone, as sharded weights do."""
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr(grpo.models.load, "fast_forward_pass", lambda model: nullcontext())
            patch.setattr(grpo.models.recompute, "fast_forward_pass", lambda model: nullcontext())
        metrics, weights = run_case(overrides, folder / "one")
    found, found_weights = run_case(overrides, folder / "several", ranks)
    assert len(metrics) == 6
    for expected, line in zip(metrics, found, strict=True):
        # A share of 4096 weights, some of which move by about the least that fp32 can.
        moved = line.pop("optim/moved", 0.0), expected.pop("optim/moved", 0.0)
        assert moved[0] == pytest.approx(moved[1], abs=2e-3)
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert any(line.get("optim/grad_norm", 0) > 1e-3 for line in metrics)  # it did train
    assert weights.keys() == found_weights.keys()
    for name, weight in weights.items():
        assert (weight - found_weights[name]).abs().max() <= 1e-5, name


@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize("overrides", USUAL, ids=" ".join)
def test_two_ranks_equal_one(
    overrides: tuple[str, ...], ranks: ProcessGroup, tmp_path: Path
) -> None:
    check_equal_to_one(overrides, ranks, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [4], indirect=True)
@pytest.mark.parametrize("overrides", DIAGONAL + BY_WHOLE_STEP, ids=" ".join)
def test_four_ranks_equal_one(
    overrides: tuple[str, ...], ranks: ProcessGroup, tmp_path: Path
) -> None:
    check_equal_to_one(overrides, ranks, tmp_path)


OWN_REWARD = """
import os, resource, signal, time
import grpo.models.cpu.linear
import grpo.training.checkpoint

calls = 0

def disturb(samples, how):
    global calls
    calls += 1
    if "RANK" not in os.environ and how == "raise" and calls == 4:
        write = grpo.training.checkpoint.flush_to_disk
        grpo.training.checkpoint.flush_to_disk = lambda folder: (time.sleep(14), write(folder))
    if os.environ.get("RANK") == "1" and calls == 4:  # after two evaluations, in step 2
        if how == "raise":
            raise ValueError("no good")
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "starve":
            grpo.models.cpu.linear.HAS_ONEDNN = False  # it needs address space of its own
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20,) * 2)
    return [float(len(sample.completion) % 3) for sample in samples]
"""
SHORT = (
    "tracking=none", "device=cpu", "batch_size=8", "eval.every=0", "eval.samples=1",
    "dataset.eval_slice=:8", "max_steps=4", "hydra.run.dir=run",
)  # fmt: skip
TWO = ("parallel=ddp", "parallel.processes=2")
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="disturbs as Linux does")


def disturb(folder: Path, how: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    (folder / "own_reward.py").write_text(OWN_REWARD)
    reward = ("+reward.own._target_=own_reward.disturb", f"+reward.own.how={how}")
    return run_grpo(*SHORT, *reward, *overrides, cwd=folder, env={"OMP_NUM_THREADS": "1"})


def count_rank_processes(folder: Path) -> int:
    """Returns how many processes of ranks work in a folder."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_rank = b"grpo.cli.rank" in (process / "cmdline").read_bytes()
            count += is_rank and (process / "cwd").resolve() == folder.resolve()
        except OSError:  # it has ended
            continue
    return count


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raise", "step 2: rank 1: reward.own: it raised ValueError: no good"),
        ("die", "step 2: rank 1 ended by SIGKILL"),
        ("stop", "step 2: rank 1 on .* gave no sign of life for 30 s"),
    ],
)
def test_a_rank_that_fails_ends_all_and_is_named(how: str, said: str, tmp_path: Path) -> None:
    started = time.monotonic()
    done = disturb(tmp_path, how, *TWO)
    assert done.returncode == 1
    assert re.search(f"grpo: {said}", done.stderr), done.stderr
    assert time.monotonic() - started < 60 + 60  # its start, and the time in which all have to end
    assert read_summary(tmp_path / "run")["status"] == "failed"
    assert (tmp_path / "run/checkpoints/step_1").is_dir()  # all that was done
    assert count_rank_processes(tmp_path) == 0


@LINUX
@pytest.mark.slow
def test_a_rank_with_less_memory_computes_less_at_once(tmp_path: Path) -> None:
    big = ("batch_size=32", "num_generation=16", "max_new_tokens=64", "temperature=1.5",
           "device.token_budget=100000", "max_steps=2", "device.precision=fp32")  # fmt: skip
    roomy = disturb(tmp_path / "roomy", "nothing", *TWO, *big)
    narrow = disturb(tmp_path / "narrow", "starve", *TWO, *big)
    assert roomy.returncode == narrow.returncode == 0, narrow.stderr
    assert "out of memory" not in roomy.stderr
    assert re.search(r"rank 1: out of memory with \d+ tokens .* from here on", narrow.stderr)
    expected, found = (read_metrics(tmp_path / name / "run") for name in ("roomy", "narrow"))
    for name in ("loss/total", "kl/mean", "optim/grad_norm", "policy/entropy", "reward/mean"):
        assert found[-1][name] == pytest.approx(expected[-1][name], rel=1e-4, abs=1e-6)


def read_own_metrics(run: Path) -> list[dict[str, float]]:
    """Returns the metrics that two equal runs have in common, to the last bit."""
    return [
        {name: value for name, value in line.items() if not name.startswith(MEASURED)}
        for line in read_metrics(run)
    ]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by two ranks that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_grpo(*SHORT, *TWO, cwd=folder, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return folder / "run"


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_resumes_with_the_same_numbers(
    number: signal.Signals, whole_run: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "grpo", *SHORT, *TWO, "checkpoint.every=1"]
    environment = copy_environment({"OMP_NUM_THREADS": "1"})
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
    wait_for_step(tmp_path / "run", 2, process)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    deadline = time.monotonic() + 60
    while count_rank_processes(tmp_path):
        assert time.monotonic() < deadline, "a rank outlives the first one"
        time.sleep(0.2)
    assert len(read_metrics(tmp_path / "run")) < 5
    done = run_grpo(*SHORT, *TWO, "resume=run", cwd=tmp_path, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert read_own_metrics(tmp_path / "run") == read_own_metrics(whole_run)


@pytest.mark.slow
def test_torchrun_starts_the_same_run(whole_run: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "grpo",
         *SHORT, "parallel=ddp"],
        cwd=tmp_path, env=copy_environment({"OMP_NUM_THREADS": "1"}), capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read_own_metrics(tmp_path / "run") == read_own_metrics(whole_run)


CLUSTER = {  # what stands for SLURM's own commands: two machines that are this one
    "scontrol": "#!/bin/sh\nprintf '127.0.0.1\\nsecond\\n'\n",
    "srun": """#!/usr/bin/env bash
shift  # --kill-on-bad-exit=1
SLURM_NODEID=1 "$@" & other=$!
SLURM_NODEID=0 "$@" && wait $other
""",
}


@pytest.mark.slow
def test_the_slurm_script_starts_a_rank_on_each_machine(whole_run: Path, tmp_path: Path) -> None:
    for name, text in CLUSTER.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable,
        "SLURM_JOB_NODELIST": "two", "SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "2",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [ROOT / "scripts" / "slurm", *SHORT, "name=a b"],
        cwd=tmp_path, env=copy_environment(environment), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read_own_metrics(tmp_path / "run") == read_own_metrics(whole_run)


@pytest.mark.slow
def test_the_jobs_of_a_sweep_have_ranks_of_their_own(tmp_path: Path) -> None:
    done = run_grpo(
        "-m", *SHORT[:-1], *TWO, "seed=0,1", "max_steps=1", "sweep_dir=sweep", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    first, second = (read_metrics(tmp_path / "sweep" / str(n)) for n in (0, 1))
    assert first[-1]["loss/total"] != second[-1]["loss/total"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["grpo", "torchrun"])
def test_an_evaluation_has_the_same_figures(launcher: str, whole_run: Path, tmp_path: Path) -> None:
    overrides = (f"checkpoint={whole_run}", "device=cpu", "device.precision=fp32",
                 "dataset.eval_slice=:20", "eval.samples=4")  # fmt: skip
    done = run_grpo("eval", *overrides, "hydra.run.dir=one", cwd=tmp_path)  # by one process
    assert done.returncode == 0, done.stderr
    several = (*overrides, "parallel=ddp", "hydra.run.dir=several")
    environment = {"OMP_NUM_THREADS": "1"}
    if launcher == "grpo":
        done = run_grpo("eval", *several, "parallel.processes=2", cwd=tmp_path, env=environment)
    else:
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "grpo",
             "eval", *several],
            cwd=tmp_path, env=copy_environment(environment), capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "several/completions.jsonl").read_text() == (
        tmp_path / "one/completions.jsonl"
    ).read_text()
    one, found = (
        json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "several")
    )
    assert found == one
    assert count_rank_processes(tmp_path) == 0


class TwoNodes:
    """Two network namespaces with an address each, joined by a cable that can be pulled."""

    addresses = ("10.77.0.1", "10.77.0.2")

    def __init__(self) -> None:
        self.names = [f"grpo{os.getpid()}n{n}" for n in range(2)]
        a, b = self.names
        for name in self.names:
            self.call("netns", "add", name)
        self.call("link", "add", "eth0", "netns", a, "type", "veth", "peer", "eth0", "netns", b)
        for name, address in zip(self.names, self.addresses, strict=True):
            self.call("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                self.call("-n", name, "link", "set", device, "up")

    def call(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    def start(self, node: int, folder: Path, *overrides: str) -> subprocess.Popen[str]:
        launcher = [
            "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1",
            f"--master-addr={self.addresses[0]}", "--master-port=29500",
        ]  # fmt: skip
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[node], sys.executable, "-m",
             "torch.distributed.run", *launcher, "-m", "grpo", *SHORT, "parallel=ddp", *overrides],
            cwd=folder, env=copy_environment({"OMP_NUM_THREADS": "1"}), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def pull_the_cable(self) -> None:
        self.call("-n", self.names[1], "link", "set", "eth0", "down")

    def remove(self) -> None:
        for name in self.names:
            self.call("netns", "delete", name)


@pytest.fixture
def two_nodes() -> Iterator[TwoNodes]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need ip and root")
    try:
        nodes = TwoNodes()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
    yield nodes
    nodes.remove()


@LINUX
@pytest.mark.slow
def test_two_nodes_train_and_resume_after_one_is_lost(
    two_nodes: TwoNodes, whole_run: Path, tmp_path: Path
) -> None:
    processes = [two_nodes.start(n, tmp_path, "checkpoint.every=1") for n in (1, 0)]
    wait_for_step(tmp_path / "run", 2, processes[1])
    two_nodes.pull_the_cable()
    pulled = time.monotonic()
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert time.monotonic() - pulled < 60
    assert all(process.returncode for process in processes)
    assert "rank 0 gave no answer for 30 s" in said[0]
    assert re.search(r"rank 1 on .* gave no sign of life for 30 s", said[1])

    two_nodes.remove()
    two_nodes.__init__()  # type: ignore[misc]
    processes = [two_nodes.start(n, tmp_path, "resume=run") for n in (1, 0)]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert not any(process.returncode for process in processes), said
    assert read_own_metrics(tmp_path / "run") == read_own_metrics(whole_run)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("parallel.processes=17",), "batch_size=16: each of 17 processes needs a prompt"),
        (("parallel.processes=0",), "parallel.processes=0: must be at least 1"),
        (("parallel.processes=2", "device=mps"), "parallel=ddp: device=mps is one GPU"),
        (("parallel.processes=2", "device=cuda"), "parallel.processes=2: this machine has 0 GPUs"),
        ((), "parallel.processes is not set, and there is no GPU to take the number from"),
    ],
)
def test_what_does_not_fit_is_refused(
    overrides: tuple[str, ...], said: str, grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, printed = grpo("parallel=ddp", *overrides)
    assert code == 2
    assert f"grpo: {said}" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("max_steps=1",), "parallel=none: torchrun has started 2 processes"),
        (("parallel=ddp", "parallel.processes=4"), "torchrun has started 2; leave it out"),
        (("-m", "seed=0,1"), "torchrun: it can start a single run or grpo eval"),
        (("check",), "torchrun: it can start a single run or grpo eval"),
    ],
)
def test_what_torchrun_can_not_start_is_refused(
    arguments: tuple[str, ...], said: str, grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "29400")
    code, printed = grpo(*arguments)
    assert code == 2
    assert said in printed


@given(st.lists(st.floats(0, 1e6)), st.integers(1, 9))
def test_items_are_divided_evenly(costs: list[float], parts: int) -> None:
    shares = divide_by_cost(costs, parts)
    assert sorted(n for share in shares for n in share) == list(range(len(costs)))
    totals = [sum(costs[n] for n in share) for share in shares]
    # What dealing in any order keeps to: the last item went to the part that cost least.
    dearest = max(costs, default=0)
    assert max(totals) <= sum(costs) / parts + dearest * (1 - 1 / parts) + 1e-6
    if len(costs) >= parts:
        assert all(shares)


def test_dear_items_go_first() -> None:
    assert divide_by_cost([1, 1, 1, 3], 2) == [[3], [0, 1, 2]]
    assert divide_by_cost([2, 2, 2, 2], 2) == [[0, 2], [1, 3]]
    assert divide_by_cost([5], 3) == [[0], [], []]


def test_messages_keep_tensors() -> None:
    sent = {
        "floats": torch.randn(3, 2), "none": torch.empty(0, 4), "scalar": torch.tensor(True),
        "bf16": torch.randn(5).bfloat16(), "text": "a\u00df", "nan": torch.tensor(torch.nan),
    }  # fmt: skip
    received = unpack(pack(sent), torch.device("cpu"))
    assert received.keys() == sent.keys()
    for name, value in sent.items():
        if isinstance(value, torch.Tensor):
            assert received[name].dtype == value.dtype
            torch.testing.assert_close(received[name], value, rtol=0, atol=0, equal_nan=True)
        else:
            assert received[name] == value


def test_gradients_of_one_type_share_a_bucket() -> None:
    small, other, large = torch.ones(3), torch.ones(3).bfloat16(), torch.ones(2**23)
    buckets = [[x.numel() for x in part] for part in collect_buckets([small, small, other, large])]
    assert buckets == [[3, 3], [2**23], [3]]


@LINUX
def test_the_interface_is_the_one_to_the_first_rank() -> None:
    assert find_interface("127.0.0.1", 29500) == "lo"
    assert find_interface("no.such.host.invalid", 29500) is None
