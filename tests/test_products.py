"""Tests that oneDNN's products on a CPU equal torch's, and leave the model unchanged."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from grpo.models.cpu.linear import (
    HAS_ONEDNN,
    computed_as,
    find_linear_layers,
    make_linear_forwards,
    make_packed_forwards,
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


def test_what_is_more_than_a_product_is_left_alone() -> None:
    class Other(nn.Linear):
        pass

    assert find_linear_layers(nn.Sequential(Other(2, 2))) == []
    assert find_linear_layers(build_layers().double()) == []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert find_linear_layers(build_layers()) == []
