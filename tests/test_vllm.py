"""Tests rollout=vllm with the real vLLM; `scripts/test_vllm` makes an environment and runs this.

It also runs the tests that all engines have to pass.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SHAPE, build_with_distinct_logits
from torch.testing import assert_close
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from grpo.device import Device, open_device
from grpo.memory.budget import Budget
from grpo.models.files import PACKAGE_FOLDER
from grpo.models.load import LanguageModel
from grpo.types import Sampling
from tests import test_rollout
from tests.test_rollout import draw_prompts, score_plainly, wrap

pytest.importorskip("vllm", reason="needs vLLM: scripts/test_vllm")
from grpo.rollout.vllm import VLLMEngine

TOKENIZER = AutoTokenizer.from_pretrained(PACKAGE_FOLDER / "tiny")
MakeEngine = Callable[[LanguageModel, int, Budget], VLLMEngine]


@pytest.fixture
def model() -> PreTrainedModel:
    return build_model()


def build_model() -> PreTrainedModel:
    """Makes a small model; vLLM's attention on a CPU needs heads of width 64."""
    return build_with_distinct_logits(lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, head_dim=64)))


@pytest.fixture(scope="module")
def started() -> VLLMEngine:
    device = open_device("cpu", "fp32")
    policy = replace(wrap(build_model(), device), tokenizer=TOKENIZER)
    return VLLMEngine(policy, 16, Budget.from_tokens(20_000))


@pytest.fixture
def make(started: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> MakeEngine:
    """Returns the one vLLM engine, with the policy and limits that a test chooses."""

    def make(policy: LanguageModel, max_new_tokens: int, budget: Budget) -> VLLMEngine:
        engine = copy.copy(started)
        engine.policy, engine.max_new_tokens = policy, max_new_tokens
        return engine

    monkeypatch.setitem(test_rollout.ENGINES, "vllm", make)
    return make


EVERY_ENGINES = (
    test_rollout.test_greedy_tokens_equal_transformers_generate,
    test_rollout.test_samples_follow_the_models_own_softmax,
    test_rollout.test_every_end_token_ends_and_is_kept,
)


@pytest.mark.parametrize("test", EVERY_ENGINES)
def test_what_holds_for_every_engine(
    test: Callable[..., None], make: MakeEngine, model: PreTrainedModel, device: Device
) -> None:
    test(model, device, "vllm")


def test_its_own_logprobs_are_nearly_the_policys(
    make: MakeEngine, model: PreTrainedModel, device: Device
) -> None:
    policy, sampling = wrap(model, device), Sampling(0.7, top_k=20, top_p=0.9)
    rollout = make(policy, 9, Budget.from_tokens(20_000)).generate(
        draw_prompts(7, 3), 4, sampling, seed=1
    )
    assert not rollout.exact_logprobs
    policys_NC = score_plainly(policy, rollout, sampling)
    assert not torch.equal(rollout.logprobs_NC, policys_NC)
    assert_close(rollout.logprobs_NC, policys_NC, atol=1e-3, rtol=1e-3)
    assert (rollout.logprobs_NC[~rollout.mask_NC] == 0).all()


def test_it_samples_with_the_weights_of_the_moment(
    make: MakeEngine, model: PreTrainedModel, device: Device
) -> None:
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    texts = []
    for current in (model, moved, model):
        test_rollout.test_greedy_tokens_equal_transformers_generate(current, device, "vllm")
        engine = make(wrap(current, device), 12, Budget.from_tokens(20_000))
        texts.append(engine.generate(draw_prompts(7, 3), 2, Sampling(0.0), seed=0).texts)
    assert texts[0] == texts[2] != texts[1]


def test_an_adapter_is_part_of_the_weights(
    make: MakeEngine, model: PreTrainedModel, device: Device
) -> None:
    from peft import LoraConfig

    adapted = copy.deepcopy(model)
    adapted.add_adapter(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.eval()
    test_rollout.test_greedy_tokens_equal_transformers_generate(adapted, device, "vllm")


def test_a_seed_gives_the_same_completions_and_another_seed_others(
    make: MakeEngine, model: PreTrainedModel, device: Device
) -> None:
    engine = make(wrap(model, device), 12, Budget.from_tokens(20_000))
    first, again, other = (
        engine.generate(draw_prompts(7, 3), 4, Sampling(1.0), seed).texts for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len(set(first)) > 4  # and the completions of a group differ


def test_the_process_is_left_as_it_was(
    make: MakeEngine, model: PreTrainedModel, device: Device
) -> None:
    torch.manual_seed(5)
    expected, threads = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(5)
    make(wrap(model, device), 4, Budget.from_tokens(20_000)).generate(
        draw_prompts(3), 2, Sampling(1.0), 1
    )
    assert torch.equal(torch.rand(3), expected)
    torch.set_num_threads(1)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(threads)


def test_a_stop_string_ends_a_completion_and_stays_in_it(
    make: MakeEngine, model: PreTrainedModel, device: Device
) -> None:
    policy = replace(wrap(model, device), tokenizer=TOKENIZER)
    stop = TOKENIZER.decode([40])
    sampling = Sampling(1.5, stop=(stop,))
    rollout = make(policy, 40, Budget.from_tokens(20_000)).generate(
        draw_prompts(5), 30, sampling, seed=3
    )
    ended = ~rollout.truncated_N
    assert 5 < ended.sum() < 30
    for n in ended.nonzero()[:, 0].tolist():
        completion = rollout.tokens_NC[n, : rollout.lengths_N[n]].tolist()
        assert completion[-1] in policy.end_ids or stop in TOKENIZER.decode(completion)
        assert stop not in TOKENIZER.decode(completion[:-1])


def test_a_run_trains_with_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {**SHAPE, "vocab_size": len(TOKENIZER), "max_position_embeddings": 512}
    LlamaForCausalLM(LlamaConfig(**shape, head_dim=64)).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    command = [
        sys.executable, "-m", "grpo", "model=local", f"model.path={tmp_path}/model",
        "rollout=vllm", "tracking=none", "max_steps=2", "max_new_tokens=8", "eval.samples=1",
        "dataset.eval_slice=:4", "reward=length", f"hydra.run.dir={tmp_path}/run",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    steps = [step for step in map(json.loads, lines) if "loss/total" in step]
    assert len(steps) == 2
    for step in steps:
        assert abs(step["sampler/kl"]) < 1e-4
        assert step["sampler/importance_max"] == pytest.approx(1, abs=1e-3)
        assert step["policy/ratio_max"] == pytest.approx(1, abs=1e-3)
