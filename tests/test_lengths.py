"""Tests models that treat long texts differently, and the checks of samplers and models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from grpo.device import Device
from grpo.errors import ConfigError
from grpo.memory.microbatch import score_rollout
from grpo.models.forward import (
    forward_plain,
    forward_shared_prompt,
    make_random_completions,
    reads_padding,
)
from grpo.models.head import Readout
from grpo.models.load import LanguageModel, copy_frozen
from grpo.models.long_context import freeze_positions, prepare_for_lengths
from grpo.rollout import HFEngine, NativeEngine
from grpo.rollout.sampler_check import check_sampler
from grpo.types import Rollout, Sampling
from tests.conftest import SHAPE, build_with_distinct_logits
from tests.test_rollout import ENGINES, ROOM, draw_prompts, wrap

CHANGE = 24  # the longrope model's positions change beyond so many tokens


def build_longrope() -> PreTrainedModel:
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0, 5.0, 7.0, 9.0]}
    rope = {"type": "longrope", **factors}
    config = Phi3Config(**SHAPE, original_max_position_embeddings=CHANGE, rope_scaling=rope)
    return Phi3ForCausalLM(config)


def build_rwkv() -> PreTrainedModel:
    config = RwkvConfig(
        vocab_size=97, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2,
        context_length=128, bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return RwkvForCausalLM(config)


def build_recurrent_gemma() -> PreTrainedModel:
    return RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**SHAPE, attention_window_size=6))


def build_falcon_mamba() -> PreTrainedModel:
    """Makes a model whose norms have weights that it doesn't use."""
    config = FalconMambaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    return FalconMambaForCausalLM(config)


def score_unpadded(model: PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    """Scores each row alone, without padding and without a cache."""
    logprobs_NC = torch.zeros_like(rollout.logprobs_NC)
    for n, length in enumerate(rollout.lengths_N.tolist()):
        prompt = list(rollout.prompts[n // rollout.num_generation].token_ids)
        completion = rollout.tokens_NC[n, :length]
        tokens = torch.tensor([prompt + completion.tolist()])
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logprobs_NC[n, :length] = logits.log_softmax(dim=-1).gather(1, completion[:, None])[:, 0]
    return logprobs_NC


def rescore(policy: LanguageModel, rollout: Rollout) -> torch.Tensor:
    """Scores a rollout as an update does."""
    return score_rollout(policy, rollout, Readout(Sampling(1.0)), ROOM.forward_limit).logprobs


@pytest.mark.parametrize("engine", ["native", "hf"])
@pytest.mark.parametrize(("prompts", "new"), [((20, 5), 16), ((30, 40), 6), ((9, 4), 8)])
def test_positions_that_change_with_length_stay_the_same_within_a_run(
    device: Device, engine: str, prompts: tuple[int, int], new: int
) -> None:
    """Completions cross the change of positions, begin after it, or end before it."""
    fresh = build_with_distinct_logits(build_longrope)
    policy = prepare_for_lengths(
        wrap(build_with_distinct_logits(build_longrope), device), max(prompts), new
    )
    reference = copy_frozen(policy, in_fp32=True)
    rollout = ENGINES[engine](policy, new, ROOM).generate(
        draw_prompts(*prompts), 3, Sampling(1.0), seed=4
    )
    assert_close(rescore(policy, rollout), rollout.logprobs_NC, atol=2e-5, rtol=1e-4)
    assert torch.equal(rescore(reference, rollout), rescore(policy, rollout))
    assert_close(score_unpadded(policy.model, rollout), rollout.logprobs_NC, atol=2e-5, rtol=1e-4)
    crosses = max(prompts) + new > CHANGE
    assert policy.context_length == (128 if crosses else CHANGE)
    if not crosses:
        assert_close(score_unpadded(fresh, rollout), rollout.logprobs_NC, atol=2e-5, rtol=1e-4)


def test_a_change_of_positions_within_reach_is_told(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    prepare_for_lengths(wrap(build_longrope(), device), 10, CHANGE - 10)
    assert "change" not in caplog.text
    prepare_for_lengths(wrap(build_longrope(), device), 10, CHANGE - 9)
    assert f"change beyond {CHANGE} tokens" in caplog.text
    assert "(10 + 15)" in caplog.text


def test_dynamic_positions_change_where_they_say_so() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    shape = {**SHAPE, "max_position_embeddings": 40}
    texts = torch.randint(3, 97, (1, 60), generator=torch.Generator().manual_seed(0))
    models = [
        build_with_distinct_logits(
            lambda: LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope))
        )
        for _ in range(2)
    ]
    assert freeze_positions(models[0], 60, 40) == 40
    with torch.no_grad():
        long = models[1](input_ids=texts).logits
        assert_close(models[0](input_ids=texts).logits, long)
        # The frozen model reads a prefix with the positions of the whole text.
        assert_close(models[0](input_ids=texts[:, :9]).logits, long[:, :9], atol=1e-4, rtol=1e-4)
        assert (models[1](input_ids=texts[:, :9]).logits - long[:, :9]).abs().max() > 1e-2


def test_a_window_that_only_the_models_own_mask_knows_is_noticed_at_its_length(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    def build_model() -> PreTrainedModel:
        model = Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, sliding_window=20))
        for layer in model.model.layers:
            layer.self_attn.sliding_window = None
        return model

    policy = wrap(build_with_distinct_logits(build_model), device)
    assert policy.forward is forward_shared_prompt
    assert prepare_for_lengths(policy, 10, 8).forward is forward_shared_prompt
    assert prepare_for_lengths(policy, 30, 8).forward is forward_plain
    assert "at 38 tokens" in caplog.text


def test_a_table_of_positions_that_ends_early_is_refused(device: Device) -> None:
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4, n_positions=32)
    policy = wrap(GPT2LMHeadModel(config).eval(), device)
    assert prepare_for_lengths(policy, 20, 12) == policy
    with pytest.raises(ConfigError, match=r"max_new_tokens=13: GPT2LMHeadModel can't read 33 tok"):
        prepare_for_lengths(policy, 20, 13)


def test_a_sampler_whose_cache_a_model_uses_in_another_way_is_refused(device: Device) -> None:
    """Differential attention calls the cache twice a layer; the second would replace the first."""
    model = build_with_distinct_logits(lambda: DiffLlamaForCausalLM(DiffLlamaConfig(**SHAPE)))
    policy = wrap(model, device)
    with pytest.raises(ConfigError, match=r"rollout=native: .* use rollout=hf"):
        check_sampler(partial(NativeEngine), policy)
    check_sampler(partial(HFEngine), policy)


def test_a_sampler_that_fails_is_refused(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = wrap(build_with_distinct_logits(build_rwkv), device)

    def fail(**_: Any) -> None:
        raise RuntimeError("a state of another shape\nand more")

    monkeypatch.setattr(policy.model, "generate", fail)
    with pytest.raises(ConfigError, match="can't sample from RwkvForCausalLM: a state of another"):
        check_sampler(partial(HFEngine), policy)


@pytest.mark.parametrize(
    "model",
    [build_rwkv, build_recurrent_gemma, build_falcon_mamba],
    ids=["rwkv", "recurrent_gemma", "falcon_mamba"],
)
def test_models_without_an_attention_to_ask_train_on_their_own_numbers(
    device: Device, model: Callable[[], PreTrainedModel]
) -> None:
    """Uses prompts of different lengths, and copies the reference after a pass with gradient."""
    built = build_with_distinct_logits(model)
    policy = wrap(built, device)
    policy = replace(policy, reads_padding=reads_padding(built, policy.head))
    assert policy.reads_padding == (model is not build_falcon_mamba)
    check_sampler(partial(HFEngine), policy)
    rollout = HFEngine(policy, 7, ROOM).generate(draw_prompts(9, 3, 3), 2, Sampling(1.0), seed=5)
    assert_close(score_unpadded(built, rollout), rollout.logprobs_NC, atol=2e-5, rtol=1e-4)
    assert policy.compute_features(
        make_random_completions(97, built.device)
    ).values_TX.requires_grad
    reference = copy_frozen(policy, in_fp32=True)
    assert torch.equal(rescore(reference, rollout), rescore(policy, rollout))
