"""What several tests need: small real models, and the command run as a user runs it."""
# ruff: noqa: E402 (libraries read the environment as they are imported)

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Nothing of the user's own: no account, no token, no proxy between a test and its server, no color.
for name in ("WANDB_API_KEY", "HF_TOKEN", "TRANSFORMERS_OFFLINE", "FORCE_COLOR"):
    os.environ.pop(name, None)
os.environ |= {
    "WANDB_MODE": "offline", "NETRC": os.devnull, "HF_TOKEN_PATH": os.devnull,
    "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost",
}  # fmt: skip

import pytest
import torch
from filelock import FileLock
from hydra.core.global_hydra import GlobalHydra
from hypothesis import settings
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from grpo.device import Device, open_device
from grpo.models import attention
from grpo.models.cpu import linear
from grpo.models.files import PACKAGE_FOLDER
from grpo.models.load import LanguageModel, load_language_model
from grpo.parallel.process_group import ProcessGroup
from grpo.parallel.start import started_ranks

settings.register_profile("grpo", deadline=None)  # a slow machine is no failure
settings.load_profile("grpo")

VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    # Heads as wide as compiled attention wants them; Gemma's are not.
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, head_dim=16)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, head_dim=16)),
    # A soft cap low enough to bite, and a window shorter than the prompts.
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, head_dim=8, sliding_window=6, final_logit_softcapping=2.0)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ),
}


@pytest.fixture(params=list(ARCHITECTURES))
def small_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A model of each architecture."""
    return build_with_distinct_logits(ARCHITECTURES[request.param])


def build_with_distinct_logits(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Random weights, large enough that the logits differ."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.fixture(scope="session")
def device() -> Device:
    return open_device("cpu", "fp32")


@pytest.fixture
def gpu_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU computes by the branches that a GPU takes: no kernel or product of a CPU's own."""
    monkeypatch.setattr(attention, "has_fused_kernel", lambda x: False)
    monkeypatch.setattr(linear, "HAS_ONEDNN", False)


@pytest.fixture
def tiny(device: Device) -> LanguageModel:
    return load_language_model(PACKAGE_FOLDER / "tiny", device)


@pytest.fixture
def grpo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs `grpo …` in this process and an empty folder: exit code, and all it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        from grpo.cli.main import main

        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["grpo", *arguments])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    return run


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest) -> Iterator[ProcessGroup]:
    """As many ranks as the test asks for. A process can belong to one group at a time only."""
    from tests.rank_cases import end_cases

    with started_ranks(request.param, "tests.rank_cases") as ranks:
        yield ranks
        end_cases(ranks)
        ranks.leave()


@pytest.fixture(autouse=True)
def close_log_files() -> Iterator[None]:
    """Closes the log files that a run in this process opened: their folder may be deleted."""
    yield
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, logging.FileHandler) and handler.baseFilename != os.devnull:
            root.removeHandler(handler)
            handler.close()


def copy_environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns this process's environment with `env`, for a process with its own W&B service."""
    return {**{k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}, **(env or {})}


def run_grpo(
    *arguments: str, cwd: Path, timeout: float = 300, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m grpo …` as a process of its own; env: added to this one's."""
    return subprocess.run(
        [sys.executable, "-m", "grpo", *arguments],
        cwd=cwd,
        env=copy_environment(env),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def start_grpo(cwd: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """As `run_grpo`, without waiting for its end; what it prints goes into a file in cwd."""
    log = (cwd / f"process{time.monotonic_ns()}.log").open("wb")
    return subprocess.Popen(
        [sys.executable, "-m", "grpo", *arguments],
        cwd=cwd, env=copy_environment(), stdout=log, stderr=log,
    )  # fmt: skip


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    """Returns once a step's line is written."""
    file, deadline = run / "metrics.jsonl", time.monotonic() + 300
    while time.monotonic() < deadline:
        if file.is_file() and f'{{"step": {step},' in file.read_text():
            return
        assert process.poll() is None, "it ended before it could be disturbed"
        time.sleep(0.005)
    process.kill()
    raise AssertionError("the step never came")


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Returns a folder that `make` fills once for all test processes; no test may change it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"once_{name}"
    made = folder.with_suffix(".made")
    with FileLock(f"{folder}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by a failure
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of experiment=smoke, all their completions kept; to be changed in a copy alone."""

    def make(cwd: Path) -> None:
        done = run_grpo(
            "experiment=smoke", "tracking=none", "hydra.run.dir=run", "max_steps=6",
            "log_prompts=4", cwd=cwd,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    return make_once(tmp_path_factory, "short", make) / "run"


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def read_summary(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return content


def copy_with_text(run: Path, copy: Path, text: str) -> None:
    """A run all of whose prompts, completions and answers are this text."""
    shutil.copytree(run, copy, symlinks=True)
    for name in ("completions.jsonl", "evaluations.jsonl"):
        lines = read_lines(run / name)
        for line in lines:
            line |= {"prompt": text, "completion": text, "answer": text, "token_ends": []}
            line |= {"failed": text}
        (copy / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Every step's metrics, less what a clock or the machine's memory says."""
    clocks = ("time/", "perf/", "memory/")
    return [
        {key: value for key, value in line.items() if not key.startswith(clocks)}
        for line in read_lines(run / "metrics.jsonl")
    ]
