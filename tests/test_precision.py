"""Tests that frozen weights in lower precision give the same numbers and take less memory."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from grpo.device import open_device
from grpo.models.adapter import Adapter, add_adapter
from grpo.models.files import PACKAGE_FOLDER
from grpo.models.forward import forward_shared_prompt
from grpo.models.load import load_language_model
from grpo.models.precision import store_frozen_weights
from tests.conftest import SHAPE, build_with_distinct_logits

BF16 = torch.bfloat16
TOKENS = torch.arange(3, 33).view(2, 15)


def compute_logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        logits: Tensor = model(input_ids=TOKENS).logits
    return logits


@pytest.mark.parametrize("exact", [True, False])
def test_no_number_changes_under_autocast(small_model: PreTrainedModel, exact: bool) -> None:
    """Embeddings are rounded if their weights are exact in bf16, as most on the hub are."""
    if exact:
        with torch.no_grad():
            for weight in small_model.parameters():
                weight.copy_(weight.to(BF16))
    expected = compute_logits(small_model)
    stored = copy.deepcopy(small_model).requires_grad_(False)
    store_frozen_weights(stored, BF16)
    assert torch.equal(compute_logits(stored), expected)
    head = stored.get_output_embeddings().weight
    table = stored.get_input_embeddings()
    assert head.dtype == BF16
    widened = type(table) is nn.Embedding and exact
    assert table.weight.dtype == (BF16 if widened else torch.float32)
    before, after = (sum(x.nbytes for x in model.parameters()) for model in (small_model, stored))
    assert after < (0.55 if widened else 0.95) * before


def test_weights_that_are_trained_stay_in_fp32(small_model: PreTrainedModel) -> None:
    small_model.requires_grad_(False)
    small_model.get_output_embeddings().weight.requires_grad_()
    store_frozen_weights(small_model, BF16)
    assert small_model.get_output_embeddings().weight.dtype == torch.float32


@pytest.mark.parametrize(
    "adapter", [{}, {"dora": True}, {"quantized": True}], ids=["lora", "dora", "qlora"]
)
def test_an_adapter_is_trained_in_fp32_over_bf16(adapter: dict[str, bool], tmp_path: Path) -> None:
    """With 4-bit weights too, the check in fp32 accepts the shared prompt."""
    shape = {**SHAPE, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 319}
    model = build_with_distinct_logits(lambda: Qwen2ForCausalLM(Qwen2Config(**shape)))
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(PACKAGE_FOLDER / "tiny").save_pretrained(tmp_path)
    options = {"rslora": False, "dora": False, "quantized": False, **adapter}
    quantized = options["quantized"]
    policy = load_language_model(tmp_path, open_device("cpu", "bf16"), quantized, frozen=True)
    add_adapter(policy.model, Adapter(4, 8.0, "all-linear", **options), seed=0)
    assert policy.forward is forward_shared_prompt
    for name, weight in policy.model.named_parameters():
        assert weight.dtype == torch.float32 or not weight.requires_grad, name
    product = policy.model.model.layers[0].mlp.down_proj.base_layer.weight
    assert product.dtype == (torch.uint8 if quantized else BF16)
    assert policy.model.lm_head.weight.dtype == BF16
