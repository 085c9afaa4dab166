"""Tests that `cpu/modules.py` computes the same as transformers, and keeps less memory."""

from __future__ import annotations

import pytest
import torch
from conftest import ARCHITECTURES, SHAPE
from peft import LoraConfig
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from grpo.device import multiplies_bf16
from grpo.models.cpu import linear
from grpo.models.cpu.linear import HAS_ONEDNN, computed_as
from grpo.models.cpu.modules import make_embedding_forwards, make_mlp_forwards, make_norm_forwards
from grpo.models.cpu.select import fast_forward_pass
from grpo.models.precision import store_frozen_weights

needs_bf16 = pytest.mark.skipif(
    not multiplies_bf16(), reason="this processor has no instructions for bf16"
)
pytestmark = pytest.mark.skipif(not HAS_ONEDNN, reason="this build of torch has no oneDNN")


def measure_kept_bytes(model: PreTrainedModel, tokens: Tensor) -> int:
    """Returns the memory that a forward pass keeps for its backward, without weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        model(input_ids=tokens, use_cache=False)
    return sum(kept.values())


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_outputs_and_gradients_are_the_modules_own(name: str) -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    modules = {**make_norm_forwards(model), **make_mlp_forwards(model)}
    assert len(modules) == 3 * 3 + 1  # two norms and an MLP a layer, and the last norm
    for module, forward in modules.items():
        x = torch.randn(1, 5, 32, requires_grad=True)
        wanted = [x, *module.parameters()]
        output, fast_output = module(x), forward(x)
        assert_close(fast_output, output)
        weight = torch.randn_like(output)
        expected = torch.autograd.grad((output * weight).sum(), wanted)
        found = torch.autograd.grad((fast_output * weight).sum(), wanted)
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("has_gradient", [True, False])
def test_a_lookups_gradient_is_added_to_what_the_weight_has(
    padding: int | None, has_gradient: bool
) -> None:
    torch.manual_seed(0)
    replaced, plain = (nn.Embedding(20, 8, padding_idx=padding) for _ in range(2))
    plain.load_state_dict(replaced.state_dict())
    (forward,) = make_embedding_forwards(nn.Sequential(replaced)).values()
    tokens = torch.randint(0, 6, (1, 40))  # each occurs several times, padding too
    for module, look in ((replaced, forward), (plain, plain)):
        module.weight.grad = torch.ones_like(module.weight) if has_gradient else None
        (look(tokens) * torch.arange(40.0)[:, None]).sum().backward()
    assert replaced.weight.grad is not None
    assert plain.weight.grad is not None
    assert_close(replaced.weight.grad, plain.weight.grad)


def test_an_embedding_that_does_more_is_left_alone() -> None:
    class Scaled(nn.Embedding):
        pass

    assert not make_embedding_forwards(
        nn.Sequential(Scaled(5, 4), nn.Embedding(5, 4, max_norm=1.0))
    )


def test_a_forward_pass_keeps_a_third_less() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    tokens = torch.randint(0, 97, (1, 64))
    usual = measure_kept_bytes(model, tokens)
    with fast_forward_pass(model):
        assert measure_kept_bytes(model, tokens) < 0.7 * usual


def test_what_computes_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's norms add 1 to the weight, its MLPs have another activation; GPT-2 has neither."""
    for name in ("gemma2", "gpt2"):
        model = ARCHITECTURES[name]().eval()
        for parameter in model.parameters():
            parameter.data.normal_()
        assert make_norm_forwards(model) == {}
        assert make_mlp_forwards(model) == {}
    model = ARCHITECTURES["llama"]().eval()
    monkeypatch.setattr(linear, "multiplies_bf16", lambda: False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make_norm_forwards(model) == {}
        assert make_mlp_forwards(model) == {}


@needs_bf16
@pytest.mark.parametrize("frozen", [False, True])
def test_a_gated_mlp_in_bf16_is_as_near_to_fp32_as_the_modules_own(frozen: bool) -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES["llama"]().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module, forward = next(iter(make_mlp_forwards(model).items()))
    x = torch.randn(1, 5, 32, requires_grad=True)
    weight = torch.randn(1, 5, 32)
    wanted = [x, *module.parameters()]
    exact = module(x)
    exact_grads = torch.autograd.grad((exact * weight).sum(), wanted)
    if frozen:
        wanted, exact_grads = wanted[:1], exact_grads[:1]
        store_frozen_weights(module.requires_grad_(False), torch.bfloat16)
    results = []
    for compute in (module, forward):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = compute(x)
        results.append((y, *torch.autograd.grad((y * weight).sum(), wanted)))
    for usual, ours, in_fp32 in zip(*results, (exact, *exact_grads), strict=True):
        error, usual_error = ((x - in_fp32).norm() / in_fp32.norm() for x in (ours, usual))
        assert 1e-4 < error <= 1.5 * usual_error


def test_an_adapted_block_keeps_its_adapter() -> None:
    model = ARCHITECTURES["llama"]().eval()
    model.add_adapter(LoraConfig(r=2, target_modules=["down_proj"]))
    assert make_mlp_forwards(model) == {}
    model = ARCHITECTURES["llama"]().eval()
    model.add_adapter(LoraConfig(r=2, target_modules=["gate_proj"], init_lora_weights=False))
    model.eval()
    x = torch.randn(1, 3, 32)
    blocks = make_mlp_forwards(model)
    assert len(blocks) == 3
    expected = [block(x) for block in blocks]
    with computed_as(blocks):
        for block, output in zip(blocks, expected, strict=True):
            assert isinstance(block, nn.Module)
            assert_close(block(x), output)
