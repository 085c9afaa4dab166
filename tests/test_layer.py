"""Tests that `cpu/layer.py` gives transformers' numbers, and leaves other kinds of layers alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from conftest import ARCHITECTURES, SHAPE, VOCABULARY
from peft import LoraConfig
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from grpo.device import multiplies_bf16
from grpo.models.attention import TreePlan, compute_hidden_states
from grpo.models.cpu import kernel
from grpo.models.cpu.linear import HAS_ONEDNN
from grpo.models.cpu.select import fast_decoding, fast_forward_pass, find_supported_layers
from grpo.models.precision import store_frozen_weights
from grpo.models.tree import Tree

needs_bf16 = pytest.mark.skipif(
    not multiplies_bf16(), reason="this processor has no instructions for bf16"
)
pytestmark = pytest.mark.skipif(not HAS_ONEDNN, reason="this build of torch has no oneDNN")

USUAL: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": ARCHITECTURES["llama"],
    "qwen2": ARCHITECTURES["qwen2"],  # with biases
    # A window shorter than a prompt with its completion.
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, head_dim=16, sliding_window=6)),
}
TREE = Tree((7, 4), (5, 3, 0, 2))
TOKENS = torch.randint(0, VOCABULARY, (7 + 4 + 10,), generator=torch.Generator().manual_seed(1))


def build_with_large_weights(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    model = build().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def compute_hidden(model: PreTrainedModel) -> Tensor:
    return compute_hidden_states(model, TOKENS, TREE.positions(torch.device("cpu")), TreePlan(TREE))


@pytest.mark.parametrize("name", USUAL)
def test_states_and_gradients_are_those_of_the_models_own_layers(name: str) -> None:
    model = build_with_large_weights(USUAL[name])
    assert len(find_supported_layers(model)) == SHAPE["num_hidden_layers"]
    weight = torch.randn(len(TOKENS), SHAPE["hidden_size"])

    def compute(within: Callable[[], object]) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        with within():  # type: ignore[attr-defined]
            for _ in range(2):  # the second time, it adds to existing gradients
                states = compute_hidden(model)
                (states * weight).sum().backward()
        return states, [p.grad for p in model.base_model.parameters() if p.grad is not None]

    expected, expected_grads = compute(nullcontext)
    fast_states, fast_grads = compute(lambda: fast_forward_pass(model))
    assert_close(fast_states, expected, atol=1e-5, rtol=1e-4)
    assert len(fast_grads) == len(expected_grads) == len(list(model.base_model.parameters()))
    for a, b in zip(fast_grads, expected_grads, strict=True):
        assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=1e-3)


@needs_bf16
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", USUAL)
def test_in_bf16_they_are_as_near_to_fp32_as_the_models_own_layers(name: str, frozen: bool) -> None:
    """Both round the same factors; with frozen weights, these are stored in bf16."""
    model = build_with_large_weights(USUAL[name])
    weight = torch.randn(len(TOKENS), SHAPE["hidden_size"])

    def compute(within: AbstractContextManager[None], in_bf16: bool) -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16), within:
            states = compute_hidden(model)
        if frozen:
            return [states]
        for _ in range(2):  # the second time, it adds to existing gradients
            (states * weight).sum().backward(retain_graph=True)
        return [states, *(p.grad for p in model.base_model.parameters() if p.grad is not None)]

    exact = compute(nullcontext(), in_bf16=False)
    if frozen:
        store_frozen_weights(model.requires_grad_(False), torch.bfloat16)
    plain = compute(nullcontext(), in_bf16=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert len(find_supported_layers(model)) == SHAPE["num_hidden_layers"]
        forward_pass = fast_forward_pass(model)
    fast = compute(forward_pass, in_bf16=True)
    assert len(exact) == len(plain) == len(fast)
    for in_fp32, theirs, ours in zip(exact, plain, fast, strict=True):
        assert ours.dtype == in_fp32.dtype == torch.float32
        error, usual_error = ((x - in_fp32).norm() / in_fp32.norm() for x in (ours, theirs))
        assert error <= 1.5 * usual_error + 1e-3
        assert usual_error > 1e-4  # so that bf16 was on


@pytest.mark.parametrize("frozen", ["embed_tokens", "q_proj", "norm", "mlp"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_does(frozen: str) -> None:
    model = build_with_large_weights(USUAL["qwen2"])
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in parameter_name)
    compute_hidden(model).sum().backward()
    expected_grads = {n: p.grad for n, p in model.base_model.named_parameters()}
    model.zero_grad()
    with fast_forward_pass(model):
        compute_hidden(model).sum().backward()
    for parameter_name, parameter in model.base_model.named_parameters():
        expected = expected_grads[parameter_name]
        assert (parameter.grad is None) == (expected is None) == (frozen in parameter_name)
        if expected is not None:
            assert_close(parameter.grad, expected, atol=1e-4, rtol=1e-3)


@needs_bf16
@torch.no_grad()
@pytest.mark.parametrize("name", USUAL)
def test_weights_laid_out_in_bf16_are_as_near_to_fp32_as_the_models_own(name: str) -> None:
    model = build_with_large_weights(USUAL[name])
    expected = compute_hidden(model)
    with torch.autocast("cpu", torch.bfloat16):
        plain = compute_hidden(model)
        with fast_decoding(model, 16):
            fast = compute_hidden(model)
    assert 1e-4 < (fast - expected).norm() <= 1.2 * (plain - expected).norm()


@torch.no_grad()
@pytest.mark.parametrize("compiles", [True, False])
@pytest.mark.parametrize("name", USUAL)
def test_weights_laid_out_together_give_the_same(
    name: str, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_with_large_weights(USUAL[name])
    expected = compute_hidden(model)
    if not compiles:
        monkeypatch.setattr(kernel, "load_kernel", lambda: None)
    with fast_decoding(model, 16):
        assert_close(compute_hidden(model), expected, atol=1e-5, rtol=1e-4)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_plain_forward_pass_is_as_ever() -> None:
    model = build_with_large_weights(USUAL["llama"])
    expected = model(input_ids=TOKENS[None]).logits
    with fast_forward_pass(model):
        assert_close(model(input_ids=TOKENS[None]).logits, expected, atol=1e-4, rtol=1e-4)


def test_layers_of_another_kind_are_left_alone() -> None:
    """Gemma has more norms, GPT-2 no gate, Qwen3 a norm for each head, and one model is in bf16."""
    others: list[PreTrainedModel] = [
        ARCHITECTURES["gemma2"](),
        ARCHITECTURES["gpt2"](),
        Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8)),
        ARCHITECTURES["llama"]().to(torch.bfloat16),
    ]
    for model in others:
        assert find_supported_layers(model.eval()) == []


def test_each_layer_is_tried_for_itself() -> None:
    """All of SmolLM3's layers are of one class, but every fourth has no positions."""
    shape = {**SHAPE, "num_hidden_layers": 5}
    model = build_with_large_weights(lambda: SmolLM3ForCausalLM(SmolLM3Config(**shape)))
    numbers = [layer.module.self_attn.layer_idx for layer in find_supported_layers(model)]
    assert numbers == [0, 1, 2, 4]
    expected = compute_hidden(model)
    with fast_forward_pass(model):
        assert_close(compute_hidden(model), expected, atol=1e-5, rtol=1e-4)


def test_a_layer_with_an_adapter_keeps_it() -> None:
    model = build_with_large_weights(USUAL["llama"])
    model.add_adapter(LoraConfig(r=2, target_modules=["v_proj"], layers_to_transform=[0]))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.normal_()
    numbers = [layer.module.self_attn.layer_idx for layer in find_supported_layers(model)]
    assert numbers == list(range(1, SHAPE["num_hidden_layers"]))
    expected = compute_hidden(model)
    with fast_forward_pass(model):
        assert_close(compute_hidden(model), expected, atol=1e-5, rtol=1e-4)
