"""Tests that oneDNN's products on a CPU equal torch's, and leave the model unchanged."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from grpo.device import multiplies_bf16
from grpo.models.cpu import linear
from grpo.models.cpu.kernel import accumulate_product_bf16, can_accumulate_bf16
from grpo.models.cpu.linear import (
    HAS_ONEDNN,
    computed_as,
    find_linear_layers,
    make_linear_forwards,
    make_packed_forwards,
)

needs_bf16 = pytest.mark.skipif(
    not (HAS_ONEDNN and multiplies_bf16()), reason="this processor has no instructions for bf16"
)
needs_kernel_in_bf16 = pytest.mark.skipif(
    not can_accumulate_bf16(torch.empty(32, 32)), reason="no compiler, or no instructions for bf16"
)
needs_onednn = pytest.mark.skipif(not HAS_ONEDNN, reason="this build of torch has no oneDNN")


def build_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 16, bias=False))


@needs_onednn
def test_gradients_are_torchs() -> None:
    model, x = build_layers(), torch.randn(2, 7, 24, requires_grad=True)
    wanted = [x, *model.parameters()]
    expected = model(x)
    expected_grads = torch.autograd.grad(expected.square().sum(), wanted)
    with computed_as(make_linear_forwards(model)):
        assert model[0].forward is not type(model[0]).forward
        found = model(x)
    assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found.square().sum(), wanted), expected_grads, strict=True):
        assert_close(a, b)


@needs_onednn
@pytest.mark.parametrize("rows", [1, 5, 32])
def test_laid_out_weights_give_the_same(rows: int) -> None:
    model, x = build_layers(), torch.randn(1, rows, 24)
    with torch.no_grad():
        expected = model(x)
        with computed_as(make_packed_forwards(16, find_linear_layers(model))):
            assert_close(model(x), expected)


@needs_onednn
def test_the_model_is_as_before_also_when_nested() -> None:
    model = build_layers()
    with computed_as(make_linear_forwards(model)):
        outer = model[0].forward
        with computed_as(make_linear_forwards(model[0])), pytest.raises(RuntimeError):
            model(torch.randn(2, 3))  # the wrong width
        assert model[0].forward is outer
    assert all("forward" not in layer.__dict__ for layer in model)


@needs_bf16
@pytest.mark.parametrize("has_gradient", [True, False])
def test_in_bf16_gradients_are_torchs_and_their_sums_are_not_rounded(has_gradient: bool) -> None:
    model, x = build_layers(), torch.randn(2, 7, 24, requires_grad=True)
    weight_24, x_TI = model[0].weight, x.detach().flatten(0, 1)
    weight_24.grad = torch.full_like(weight_24, 1000.0) if has_gradient else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with computed_as(make_linear_forwards(model[0])):
            y = model[0](x)
        expected = model[0](x)
    assert y.dtype == torch.bfloat16
    assert_close(y, expected)
    grad = torch.randn_like(y)
    y.backward(grad)
    exact = grad.flatten(0, 1).double().t() @ x_TI.bfloat16().double()
    start = 1000.0 if has_gradient else 0.0
    assert weight_24.grad is not None
    assert_close(
        weight_24.grad.double(), start + exact, atol=3e-4 if has_gradient else 1e-5, rtol=0
    )
    (of_x,) = torch.autograd.grad(expected, x, grad)
    assert x.grad is not None
    assert_close(x.grad, of_x, atol=0.02, rtol=0.02)


@needs_kernel_in_bf16
@settings(max_examples=25)
@given(
    tokens=st.integers(1, 40) | st.sampled_from([511, 512, 513, 1100]), outputs=st.integers(1, 4),
    inputs=st.integers(1, 4),
)  # fmt: skip
def test_a_products_gradient_is_summed_in_fp32(tokens: int, outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    a, b = (
        torch.randn(tokens, 32 * n + 1, generator=generator).bfloat16()[:, 1:]
        for n in (outputs, inputs)
    )
    gradient = torch.randn(32 * outputs, 32 * inputs, generator=generator)
    expected = gradient.double() + a.double().t() @ b.double()
    accumulate_product_bf16(gradient, a, b)
    assert_close(gradient.double(), expected, atol=1e-6 * tokens + 1e-5, rtol=1e-5)


def test_what_is_more_than_a_product_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(nn.Linear):
        pass

    assert find_linear_layers(nn.Sequential(Other(2, 2))) == []
    assert find_linear_layers(build_layers().double()) == []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        monkeypatch.setattr(linear, "multiplies_bf16", lambda: True)
        assert len(find_linear_layers(build_layers())) == 2
        monkeypatch.setattr(linear, "multiplies_bf16", lambda: False)
        assert find_linear_layers(build_layers()) == []
