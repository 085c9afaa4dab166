"""Tests that the shared, chunked forward gives the plain forward's numbers and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

from grpo.memory.microbatch import split_head_chunks
from grpo.models import head as head_module
from grpo.models.forward import (
    Completions,
    Forward,
    find_sharing_problem,
    forward_plain,
    forward_shared_prompt,
    score_completions,
)
from grpo.models.head import Head, Readout, TokenScores
from grpo.models.load import choose_forward
from grpo.types import Sampling

TEMPERATURE = 0.7


def score_batch(
    forward: Forward,
    model: PreTrainedModel,
    batch: Completions,
    readout: Readout = Readout(Sampling(TEMPERATURE)),  # noqa: B008
) -> TokenScores:
    return score_completions(forward(model, Head(model), batch), batch, readout)


def draw_batch() -> Completions:
    """Makes three prompts of 9, 4 and 1 tokens, with four completions of 1 to 11 tokens each."""
    generator = torch.Generator().manual_seed(1)
    lengths_N = torch.tensor([11, 1, 5, 2, 7, 7, 3, 11, 1, 1, 4, 9])
    return Completions(
        prompts_BP=torch.randint(0, 97, (3, 9), generator=generator),
        prompt_lengths_B=torch.tensor([9, 4, 1]),
        tokens_NC=torch.randint(0, 97, (12, 11), generator=generator),
        mask_NC=torch.arange(11) < lengths_N[:, None],
    )


def score_unpadded(model: PreTrainedModel, batch: Completions, n: int) -> Tensor:
    """Scores row n alone from the model's own logits, without padding, cache and chunks."""
    b = n // batch.rows_per_prompt
    prompt = batch.prompts_BP[b, -int(batch.prompt_lengths_B[b]) :]
    completion = batch.tokens_NC[n][batch.mask_NC[n]]
    tokens = torch.cat([prompt, completion])[None]
    logits = model(input_ids=tokens).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    return torch.log_softmax(logits, dim=-1).gather(1, completion[:, None])[:, 0]


def relative_difference(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


@pytest.mark.parametrize("chunk_logits", [97 * 7, 2**24], ids=["small chunks", "one chunk"])
def test_scores_and_gradients_equal_the_plain_forwards(
    small_model: PreTrainedModel, chunk_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head_module.CHUNK_LOGITS, "cpu", chunk_logits)
    batch = draw_batch()
    weights_NC = torch.randn(12, 11, generator=torch.Generator().manual_seed(2)) * batch.mask_NC
    results = []
    for forward in (forward_shared_prompt, forward_plain):
        small_model.zero_grad()
        scores = score_batch(forward, small_model, batch)
        (weights_NC * scores.logprobs).sum().backward()
        gradients = [p.grad.clone() for p in small_model.parameters() if p.grad is not None]
        results.append((scores, gradients))
    (shared, shared_gradients), (plain, plain_gradients) = results
    assert relative_difference(shared.logprobs, plain.logprobs) <= 1e-5
    assert relative_difference(shared.entropy, plain.entropy) <= 1e-5
    assert len(shared_gradients) == len(plain_gradients) > 10
    for a, b in zip(shared_gradients, plain_gradients, strict=True):
        assert relative_difference(a, b) <= 1e-5


def test_a_part_of_a_batch_is_a_batch(small_model: PreTrainedModel) -> None:
    """The rows of a part have copies of their prompts, which a repetition penalty needs."""
    batch, head = draw_batch(), Head(small_model)
    readout = Readout(Sampling(temperature=0.8, repetition_penalty=1.5))
    features = forward_shared_prompt(small_model, head, batch)
    whole = score_completions(features, batch, readout)
    for rows, tokens in split_head_chunks(batch, 20):
        part_features, part = features.select_detached(tokens), batch.select_rows(rows)
        scores = score_completions(part_features, part, readout)
        again = score_completions(forward_plain(small_model, head, part), part, readout)
        for a, b, c in zip(whole, scores, again, strict=True):
            assert_close(b, a[rows])
            assert_close(b, c, atol=1e-5, rtol=1e-5)


def test_a_second_backward_pass_is_the_first_again(small_model: PreTrainedModel) -> None:
    """The first backward pass overwrites its logits."""
    batch = draw_batch()
    total = score_batch(forward_shared_prompt, small_model, batch).logprobs.sum()
    wanted = [p for p in small_model.parameters() if p.requires_grad]
    first = torch.autograd.grad(total, wanted, retain_graph=True, allow_unused=True)
    again = torch.autograd.grad(total, wanted, allow_unused=True)
    for a, b in zip(first, again, strict=True):
        assert a is b is None or relative_difference(a, b) <= 1e-6


def test_gradients_are_bit_for_bit_repeatable(small_model: PreTrainedModel) -> None:
    """Many completions add to the gradient of their prompt's last token.

    There are enough of them that torch splits the sum over threads, with and without a window.
    """
    generator = torch.Generator().manual_seed(1)
    completions = 1000
    batch = Completions(
        prompts_BP=torch.randint(0, 97, (1, 6), generator=generator),
        prompt_lengths_B=torch.tensor([6]),
        tokens_NC=torch.randint(0, 97, (completions, 2), generator=generator),
        mask_NC=torch.ones(completions, 2, dtype=torch.bool),
    )
    by_NC = torch.randn(completions, 2, generator=generator)

    def compute_gradients() -> list[Tensor]:
        small_model.zero_grad()
        (score_batch(forward_shared_prompt, small_model, batch).logprobs * by_NC).sum().backward()
        return [p.grad.clone() for p in small_model.parameters() if p.grad is not None]

    first = compute_gradients()
    assert all(
        torch.equal(a, b)
        for _ in range(10)
        for a, b in zip(first, compute_gradients(), strict=True)
    )


def test_padding_changes_nothing(small_model: PreTrainedModel) -> None:
    """A row's scores in the batch equal those of the row alone, without padding."""
    batch = draw_batch()
    scores = score_batch(forward_shared_prompt, small_model, batch)
    for n in range(12):
        assert_close(
            scores.logprobs[n][batch.mask_NC[n]],
            score_unpadded(small_model, batch, n),
            atol=1e-5,
            rtol=1e-5,
        )
    assert (scores.logprobs[~batch.mask_NC] == 0).all()


def test_entropy_is_that_of_the_distribution(small_model: PreTrainedModel) -> None:
    batch = draw_batch()
    scores = score_batch(forward_shared_prompt, small_model, batch)
    prompt = batch.prompts_BP[:1]
    logits = small_model(input_ids=prompt).logits[0, -1] / TEMPERATURE
    assert_close(
        scores.entropy[0, 0],
        torch.distributions.Categorical(logits=logits).entropy(),
        atol=1e-5,
        rtol=1e-5,
    )


def test_completions_of_one_token_need_no_second_pass(small_model: PreTrainedModel) -> None:
    batch = draw_batch()
    first = Completions(
        batch.prompts_BP, batch.prompt_lengths_B, batch.tokens_NC[:, :1], batch.mask_NC[:, :1]
    )
    whole = score_batch(forward_shared_prompt, small_model, batch).logprobs[:, :1]
    assert_close(score_batch(forward_shared_prompt, small_model, first).logprobs, whole)


def test_a_model_whose_logits_are_changed_after_the_head_is_noticed(
    small_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = Head(small_model)
    assert find_sharing_problem(small_model, head) == ""
    original = type(small_model).forward

    def double_logits(self: PreTrainedModel, **inputs: object) -> object:
        output = original(self, **inputs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(type(small_model), "forward", double_logits)
    assert choose_forward(small_model, head) is forward_plain


def test_a_model_without_a_cache_to_share_takes_the_plain_forward() -> None:
    config = MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = MambaForCausalLM(config).eval()
    assert choose_forward(model, Head(model)) is forward_plain
