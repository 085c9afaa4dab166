"""Tests that adapters are trained alone, and can be switched off, saved, merged and resumed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

from grpo.device import Device, open_device
from grpo.errors import ConfigError
from grpo.models import adapter as adapter_module
from grpo.models.adapter import Adapter, add_adapter, load_adapter, merge_adapter, save_adapter
from grpo.models.cpu.select import fast_forward_pass
from grpo.models.files import PACKAGE_FOLDER
from grpo.models.forward import (
    Completions,
    Forward,
    forward_plain,
    forward_shared_prompt,
    score_completions,
)
from grpo.models.head import Head, Readout
from grpo.models.load import LanguageModel, choose_forward, load_language_model
from grpo.models.reference import make_reference
from grpo.types import Sampling
from tests.conftest import SHAPE, build_with_distinct_logits, read_lines
from tests.test_forward import draw_batch

Grpo = Callable[..., tuple[int, str]]
LORA = Adapter(rank=4, alpha=8, target="all-linear", rslora=False, dora=False, quantized=False)
KINDS = {"lora": LORA, "rslora": replace(LORA, rslora=True), "dora": replace(LORA, dora=True)}
READOUT = Readout(Sampling(0.7))
ROOT = Path(__file__).parents[1]


def score_batch(
    model: PreTrainedModel, batch: Completions, forward: Forward = forward_shared_prompt
) -> Tensor:
    with fast_forward_pass(
        model
    ):  # as LanguageModel computes, so that numbers are equal to the last bit
        return score_completions(forward(model, Head(model), batch), batch, READOUT).logprobs


def shake(model: PreTrainedModel) -> None:
    """Changes the adapter's weights, since a fresh adapter has no effect."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_trained_alone_and_by_the_right_gradient(
    small_model: PreTrainedModel, kind: str
) -> None:
    batch = draw_batch()
    before = score_batch(small_model, batch)
    add_adapter(small_model, KINDS[kind], seed=0)
    assert torch.equal(score_batch(small_model, batch), before)  # a fresh one changes nothing
    shake(small_model)
    gradients = []
    for forward in (forward_shared_prompt, forward_plain):
        small_model.zero_grad()
        score_batch(small_model, batch, forward).sum().backward()
        named = small_model.named_parameters()
        gradients.append({name: p.grad for name, p in named if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all("lora_" in name for name in gradients[0])
    assert len(gradients[0]) > 8
    largest = max(float(gradient.abs().max()) for gradient in gradients[1].values())
    for name, ours in gradients[0].items():
        assert float((ours - gradients[1][name]).abs().max()) <= 1e-5 * largest


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_model_with_the_adapter_switched_off(
    tiny: LanguageModel, kind: str
) -> None:
    batch = draw_batch()
    before = score_batch(tiny.model, batch)
    add_adapter(tiny.model, KINDS[kind], seed=0)
    shake(tiny.model)
    reference = make_reference(tiny, moves=False)
    assert reference.model.model is tiny.model  # no second copy
    trained = [p.requires_grad for p in tiny.model.parameters()]
    found = score_completions(reference.compute_features(batch), batch, READOUT).logprobs
    assert torch.equal(found, before)
    assert not torch.allclose(score_batch(tiny.model, batch), before)  # the adapter is on again
    assert [p.requires_grad for p in tiny.model.parameters()] == trained


def test_a_reference_that_moves_is_a_second_adapter(tiny: LanguageModel) -> None:
    batch = draw_batch()
    add_adapter(tiny.model, LORA, seed=0)
    trained = {n for n, p in tiny.model.named_parameters() if p.requires_grad}
    reference = make_reference(tiny, moves=True)
    assert {n for n, p in tiny.model.named_parameters() if p.requires_grad} == trained
    before = score_batch(tiny.model, batch)
    shake(tiny.model)

    def score_by_reference() -> Tensor:
        return score_completions(reference.compute_features(batch), batch, READOUT).logprobs

    assert torch.equal(score_by_reference(), before)
    reference.move(1.0)
    assert torch.equal(score_by_reference(), score_batch(tiny.model, batch))
    assert not torch.allclose(score_by_reference(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_loads_in_transformers_and_here(
    tiny: LanguageModel, kind: str, tmp_path: Path, device: Device
) -> None:
    batch = draw_batch()
    add_adapter(tiny.model, KINDS[kind], seed=0)
    shake(tiny.model)
    tiny.save(tmp_path / "model")
    assert sum(f.stat().st_size for f in (tmp_path / "model").glob("*.safetensors")) < 2e6
    expected = score_batch(tiny.model, batch)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert torch.equal(score_batch(loaded, batch), expected)
    assert torch.equal(
        score_batch(load_language_model(tmp_path / "model", device).model, batch), expected
    )


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
def test_an_adapter_over_experts_is_kept_moved_and_merged(
    family: str, tmp_path: Path, device: Device
) -> None:
    """In a mixture's experts, peft wraps two weights of one module as nested layers."""
    shape = {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}
    if family == "Qwen3Moe":
        shape |= {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 16}
    config = getattr(transformers, f"{family}Config")(**shape)
    model = build_with_distinct_logits(lambda: AutoModelForCausalLM.from_config(config))
    head, batch = Head(model), draw_batch()
    policy = LanguageModel(model, None, head, choose_forward(model, head), (2,), 128, device)  # type: ignore[arg-type]
    base = copy.deepcopy(model)
    before = score_batch(model, batch)
    add_adapter(model, LORA, seed=0)
    assert any(".experts." in name for name, p in model.named_parameters() if p.requires_grad)
    reference = make_reference(policy, moves=True)
    shake(model)
    after = score_batch(model, batch)
    assert not torch.allclose(after, before)

    def score_by_reference() -> Tensor:
        return score_completions(reference.compute_features(batch), batch, READOUT).logprobs

    assert_close(score_by_reference(), before, atol=1e-5, rtol=1e-5)
    reference.move(1.0)
    assert_close(score_by_reference(), after, atol=1e-5, rtol=1e-5)
    assert_close(score_batch(merge_adapter(model), batch), after, atol=1e-4, rtol=1e-4)
    save_adapter(model, tmp_path, "nowhere")
    load_adapter(base, tmp_path)
    assert_close(score_batch(base, batch), after, atol=1e-5, rtol=1e-5)
    plain_names = {name for name, _ in merge_adapter(base).named_parameters()}
    assert plain_names == {name for name, _ in type(model)(config).named_parameters()}


def test_an_adapter_of_another_shape_is_refused(tiny: LanguageModel, tmp_path: Path) -> None:
    add_adapter(tiny.model, replace(LORA, rank=2), seed=0)
    save_adapter(tiny.model, tmp_path, "nowhere")
    other = AutoModelForCausalLM.from_pretrained(PACKAGE_FOLDER / "tiny", dtype=torch.float32)
    add_adapter(other, LORA, seed=0)
    with pytest.raises(ConfigError, match="another shape"):
        load_adapter(other, tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_adapter_that_is_the_reference_moves_by_small_steps(precision: str) -> None:
    """It is in fp32 beside frozen weights in bf16, which would lose most of such a step."""
    policy = load_language_model(
        PACKAGE_FOLDER / "tiny", open_device("cpu", precision), frozen=True
    )
    add_adapter(policy.model, LORA, seed=0)
    reference = make_reference(policy, moves=True)
    with torch.no_grad():
        for _, of_policy in reference.weight_pairs:
            of_policy += 1e-4
    reference.move(0.5)
    for of_reference, of_policy in reference.weight_pairs:
        assert of_reference.dtype == torch.float32
        assert_close(of_policy - of_reference, torch.full_like(of_policy, 5e-5), atol=1e-8, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_a_run_with_an_adapter_is_resumed_evaluated_and_merged(
    adapter: str, grpo: Grpo, tmp_path: Path, device: Device
) -> None:
    """Four steps in one run and in two give the same numbers and weights, with all adapters."""
    common = [
        "experiment=smoke", f"adapter={adapter}", "learning_rate=1e-3", "tracking=none",
        "dataset.eval_size=8", "eval.every=0", "kl.sync_every=2", "device.precision=bf16",
    ]  # fmt: skip
    assert grpo(*common, "max_steps=4", "hydra.run.dir=whole")[0] == 0
    assert grpo(*common, "max_steps=2", "hydra.run.dir=parts")[0] == 0
    code, printed = grpo("resume=parts", "max_steps=4")
    assert code == 0, printed

    def read_timeless(run: str) -> list[dict[str, Any]]:
        rows = read_lines(tmp_path / run / "metrics.jsonl")
        no_eval = [row for row in rows if row["step"] != 2]  # where the first part ended
        apart = ("time/", "perf/", "memory/")
        return [{k: v for k, v in row.items() if not k.startswith(apart)} for row in no_eval]

    assert read_timeless("whole") == read_timeless("parts")
    weights = [
        (tmp_path / run / "checkpoints/latest/model/adapter_model.safetensors").read_bytes()
        for run in ("whole", "parts")
    ]
    assert weights[0] == weights[1]

    code, printed = grpo("eval", "checkpoint=whole", "hydra.run.dir=evaluated")
    assert code == 0, printed
    evaluated = json.loads((tmp_path / "evaluated/evaluation.json").read_text())
    last = read_lines(tmp_path / "whole/metrics.jsonl")[-1]
    assert evaluated["eval/sampled_accuracy"] == last["eval/sampled_accuracy"]

    code, printed = grpo("export", "whole", "merged")
    assert code == 0, printed
    plain_model = load_language_model(tmp_path / "merged", device)
    assert not [name for name in plain_model.model.state_dict() if "lora" in name]
    folder = tmp_path / "whole/checkpoints/latest/model"
    trained = load_language_model(folder, device, quantized=adapter == "qlora")
    batch = draw_batch()
    merged_scores, trained_scores = (
        score_batch(plain_model.model, batch),
        score_batch(trained.model, batch),
    )
    assert_close(merged_scores, trained_scores, atol=1e-4, rtol=1e-4)


def test_a_run_is_not_gone_on_with_under_another_adapter(grpo: Grpo, tmp_path: Path) -> None:
    common = ["experiment=smoke", "tracking=none", "max_steps=1", "dataset.eval_size=4"]
    assert grpo(*common, "adapter=lora", "hydra.run.dir=run")[0] == 0
    for other in ("adapter=none", "adapter.rank=4"):
        code, printed = grpo("resume=run", "max_steps=2", other)
        assert code == 2, printed
        assert "this run trains adapter=" in printed


@pytest.mark.slow
def test_an_optimizer_with_another_state_is_refused(grpo: Grpo, tmp_path: Path) -> None:
    common = ["experiment=smoke", "tracking=none", "max_steps=1", "dataset.eval_size=4"]
    assert grpo(*common, "optim.name=adamw_8bit", "hydra.run.dir=run")[0] == 0
    code, printed = grpo("resume=run", "max_steps=2", "optim.name=adamw")
    assert code == 2
    assert "optim.name=adamw: this run's optimizer is adamw_8bit" in printed
    code, printed = grpo("resume=run", "max_steps=2")
    assert code == 0, printed


def test_an_adapters_folder_is_no_model_to_begin_with(
    tiny: LanguageModel, grpo: Grpo, tmp_path: Path
) -> None:
    add_adapter(tiny.model, LORA, seed=0)
    tiny.save(tmp_path / "adapter")
    code, printed = grpo("model=local", "model.path=adapter", "tracking=none")
    assert code == 2
    assert "model.path=adapter: holds only an adapter" in printed


def test_tied_embeddings_are_not_adapted_alone(grpo: Grpo) -> None:
    code, printed = grpo("adapter=lora", "adapter.target=[q_proj,embed_tokens]", "tracking=none")
    assert code == 2
    assert "also its output layer" in printed


@pytest.mark.slow
def test_a_moved_reference_is_not_forgotten(grpo: Grpo, tmp_path: Path) -> None:
    """The first part moves the reference; the second and third keep it."""
    common = [
        "experiment=smoke", "tracking=none", "dataset.eval_size=4", "learning_rate=1e-3",
        "device.precision=fp32",
    ]  # fmt: skip
    assert grpo(*common, "max_steps=2", "kl.sync_every=1", "hydra.run.dir=run")[0] == 0
    for steps in (3, 4):
        code, printed = grpo("resume=run", "kl.sync_every=0", f"max_steps={steps}")
        assert code == 0, printed
    kls = [row["kl/k2"] for row in read_lines(tmp_path / "run/metrics.jsonl")[1:]]
    assert kls[2] < 1e-9 < kls[3]  # the reference had just been set to the policy
    kept = [
        torch.load(tmp_path / f"run/checkpoints/step_{step}/trainer.pt", weights_only=True)
        for step in (3, 4)
    ]
    pairs = zip(*(state["pull"]["reference"] for state in kept), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with_adapter = [*common, "adapter=lora", "max_steps=1", "kl.sync_every=1"]
    assert grpo(*with_adapter, "hydra.run.dir=lora")[0] == 0
    code, printed = grpo("resume=lora", "kl.sync_every=0", "max_steps=2")
    assert code == 2
    assert "keep kl.sync_every above 0" in printed


@pytest.mark.slow
def test_a_kl_that_is_added_later_begins_with_its_own_weight(grpo: Grpo, tmp_path: Path) -> None:
    common = ["experiment=smoke", "tracking=none", "dataset.eval_size=4"]
    assert grpo(*common, "kl=none", "max_steps=1", "hydra.run.dir=run")[0] == 0
    code, printed = grpo("resume=run", "kl=k3", "kl.target=0.1", "max_steps=2")
    assert code == 0, printed
    assert read_lines(tmp_path / "run/metrics.jsonl")[-1]["kl/weight"] == 0.02


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merged_weights_are_handed_over_one_layer_at_a_time(
    dora: bool, tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They equal the merged model's weights, and at most one layer is copied at a time."""
    add_adapter(tiny.model, replace(LORA, dora=dora), seed=0)
    shake(tiny.model)
    expected = dict(adapter_module.merge_adapter(tiny.model).named_parameters())
    copied: list[int] = []
    deepcopy = copy.deepcopy

    def record_and_copy(layer: Any, *rest: Any) -> Any:
        if isinstance(layer, torch.nn.Module):
            copied.append(sum(x.numel() for x in layer.parameters()))
        return deepcopy(layer, *rest)

    monkeypatch.setattr(adapter_module.copy, "deepcopy", record_and_copy)
    found = dict(adapter_module.iterate_merged_weights(tiny.model))
    assert set(found) == set(expected)
    for name, weight in expected.items():
        assert_close(found[name], weight.detach())
    largest = max(x.numel() for x in tiny.model.model.layers.parameters())
    assert max(copied) < 2 * largest
