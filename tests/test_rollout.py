"""Tests that engines sample on-policy, from the reported distribution, and stop at end tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from grpo.device import Device
from grpo.memory.budget import Budget
from grpo.memory.microbatch import MicroBatch, score_rollout, select_completions
from grpo.models.cpu import kernel
from grpo.models.forward import Completions, forward_plain, left_mask, score_completions
from grpo.models.head import Head, Readout, score_tokens
from grpo.models.load import LanguageModel, choose_forward
from grpo.models.padding import pad_left
from grpo.rollout import Engine, HFEngine, NativeEngine
from grpo.rollout.engine import GroupPart, choose_next_batch
from grpo.rollout.token_sampling import sample_tokens
from grpo.types import Example, Prompt, Rollout, Sampling


class Uncompiled(NativeEngine):
    """Acts as if there were no C compiler."""

    def generate(self, *wanted: Any, **named: Any) -> Rollout:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "load_kernel", lambda: None)
            return super().generate(*wanted, **named)


ENGINES = {"native": NativeEngine, "uncompiled": Uncompiled, "hf": HFEngine}
MakeEngine = Callable[..., Engine]

ROOM = Budget.from_tokens(10**6)


class Letters:
    """A minimal tokenizer: the text of token 3 is c3."""

    pad_token_id = 0

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(f"c{token}" for token in row) for row in rows]


def wrap(model: PreTrainedModel, device: Device, end_ids: tuple[int, ...] = (2,)) -> LanguageModel:
    head = Head(model)
    return LanguageModel(
        model, Letters(), head, choose_forward(model, head), end_ids, 128, device  # type: ignore[arg-type]
    )  # fmt: skip


def draw_prompts(*lengths: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(3)
    example = Example("q", "a", float)
    return [
        Prompt("q", tuple(torch.randint(3, 97, (n,), generator=generator).tolist()), example)
        for n in lengths
    ]


def score_plainly(policy: LanguageModel, rollout: Rollout, sampling: Sampling) -> Tensor:
    """Returns the plain forward's log-probabilities of the sampled tokens, all rows at once."""
    everything = MicroBatch(list(range(len(rollout.prompts))), torch.arange(len(rollout.texts)), 0)
    inputs = select_completions(rollout, everything, policy)
    with torch.no_grad():
        features = forward_plain(policy.model, policy.head, inputs)
        return score_completions(features, inputs, Readout(sampling)).logprobs


@pytest.mark.parametrize("engine", ENGINES)
def test_logprobs_are_the_policys_at_the_temperature(
    small_model: PreTrainedModel, device: Device, engine: str
) -> None:
    policy = wrap(small_model, device, end_ids=(2, 5, 50, 80))
    rollout = ENGINES[engine](policy, 9, ROOM).generate(
        draw_prompts(7, 3, 5), 6, Sampling(0.7), seed=1
    )
    assert_close(
        rollout.logprobs_NC, score_plainly(policy, rollout, Sampling(0.7)), atol=2e-5, rtol=1e-4
    )
    assert (rollout.logprobs_NC[~rollout.mask_NC] == 0).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_tokens_equal_transformers_generate(
    small_model: PreTrainedModel, device: Device, engine: str
) -> None:
    policy = wrap(small_model, device)
    prompts = draw_prompts(7, 3, 5)
    rollout = ENGINES[engine](policy, 12, ROOM).generate(prompts, 2, Sampling(0.0), seed=0)
    for n, prompt in enumerate(p for p in prompts for _ in range(2)):
        alone = torch.tensor([prompt.token_ids])
        expected = small_model.generate(
            alone, attention_mask=torch.ones_like(alone), do_sample=False, max_new_tokens=12
        )[0, len(prompt.token_ids) :]
        assert rollout.tokens_NC[n][rollout.mask_NC[n]].tolist() == expected.tolist()


@pytest.mark.parametrize("engine", ENGINES)
def test_samples_follow_the_models_own_softmax(
    small_model: PreTrainedModel, device: Device, engine: str
) -> None:
    """Compares 4,000 first tokens with their exact probabilities, by a chi-square test at 1e-4.

    The model's generation config asks for top-k 1 and a repetition penalty: neither may act.
    """
    small_model.generation_config.update(do_sample=True, top_k=1, repetition_penalty=2.0)
    policy, prompt = wrap(small_model, device), draw_prompts(6)
    rollout = ENGINES[engine](policy, 1, ROOM).generate(prompt, 4000, Sampling(1.3), seed=5)
    logits = small_model(torch.tensor([prompt[0].token_ids])).logits[0, -1]
    expected = torch.softmax(logits / 1.3, dim=-1).detach() * 4000
    counts = torch.bincount(rollout.tokens_NC[:, 0], minlength=97)
    common = expected >= 5
    chi_square = ((counts - expected)[common] ** 2 / expected[common]).sum()
    freedom = int(common.sum())
    assert chi_square < freedom + 3.8 * (2 * freedom) ** 0.5 + 15
    assert counts[~common].sum() <= expected[~common].sum() + 4 * expected[~common].sum() ** 0.5 + 5


@pytest.mark.parametrize("engine", ENGINES)
def test_every_end_token_ends_and_is_kept(
    small_model: PreTrainedModel, device: Device, engine: str
) -> None:
    """Most completions end here, and one of the end tokens is the padding token too."""
    ends = (0, *range(60, 76))
    policy = wrap(small_model, device, end_ids=ends)
    rollout = ENGINES[engine](policy, 8, ROOM).generate(
        draw_prompts(4, 6), 40, Sampling(1.0), seed=2
    )
    ended = ~rollout.truncated_N
    assert 5 < ended.sum() < 80
    for n in range(80):
        completion = rollout.tokens_NC[n][rollout.mask_NC[n]]
        assert not torch.isin(completion[:-1], torch.tensor(ends)).any()
        assert bool(torch.isin(completion[-1], torch.tensor(ends))) == bool(ended[n])
        assert len(completion) == 8 or ended[n]


def test_pad_that_is_also_the_end_is_trained_once(
    small_model: PreTrainedModel, device: Device
) -> None:
    """pad = eos: the first one is an action and in the mask, the padding after it is not."""
    policy = wrap(small_model, device, end_ids=tuple(range(0, 97, 2)))
    rollout = NativeEngine(policy, 6, ROOM).generate(draw_prompts(5), 50, Sampling(1.0), seed=0)
    short = (rollout.lengths_N < rollout.tokens_NC.shape[1]).nonzero()[:, 0]
    assert len(short) > 10
    for n in short.tolist():
        length = int(rollout.lengths_N[n])
        assert int(rollout.tokens_NC[n, length - 1]) in policy.end_ids
        assert rollout.mask_NC[n].sum() == length


@pytest.mark.parametrize("engine", [NativeEngine, Uncompiled])
def test_budget_and_finished_rows_change_no_greedy_token(
    small_model: PreTrainedModel, device: Device, engine: type[NativeEngine]
) -> None:
    """One prompt at a time, all at once, or with ended rows dropped, completions are the same."""
    policy = wrap(small_model, device, end_ids=tuple(range(0, 97, 3)))
    prompts = draw_prompts(7, 3, 5, 9, 2)
    at_once = engine(policy, 10, ROOM).generate(prompts, 2, Sampling(0.0), seed=0)
    one_by_one = engine(policy, 10, Budget.from_tokens(1)).generate(
        prompts, 2, Sampling(0.0), seed=0
    )
    assert at_once.texts == one_by_one.texts
    assert len(set(at_once.lengths_N.tolist())) > 1
    assert_close(at_once.logprobs_NC, one_by_one.logprobs_NC, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_seed_gives_the_same_completions_and_another_seed_others(
    tiny: LanguageModel, engine: str
) -> None:
    make = ENGINES[engine](tiny, 20, ROOM)
    prompts = [
        Prompt("q", tuple(tiny.tokenizer.encode("What is 3 + 4?")), Example("q", "7", float))
    ]
    first, again, other = (
        make.generate(prompts, 8, Sampling(1.0), seed=s).texts for s in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_left_padding_marks_the_prompts_own_tokens() -> None:
    padded_BP, lengths_B = pad_left([[5, 6, 7], [8]], 0, torch.device("cpu"))
    assert padded_BP.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert left_mask(padded_BP, lengths_B).tolist() == [[1, 1, 1], [0, 0, 1]]


def test_completions_are_cut_from_a_rollout_by_whole_groups(tiny: LanguageModel) -> None:
    prompts = draw_prompts(3, 5)
    rollout = NativeEngine(tiny, 6, ROOM).generate(prompts, 2, Sampling(1.0), seed=0)
    part = select_completions(rollout, MicroBatch([1], torch.tensor([2, 3]), 17), tiny)
    assert isinstance(part, Completions)
    assert part.prompts_BP.tolist() == [list(prompts[1].token_ids)]
    assert part.rows_per_prompt == 2


CUTS = {
    "top_k": Sampling(0.9, top_k=7),
    "top_p": Sampling(1.2, top_p=0.8),
    "min_p": Sampling(1.0, min_p=0.1),
    "penalty": Sampling(0.8, repetition_penalty=1.7),
    "all": Sampling(1.1, repetition_penalty=1.3, top_k=30, top_p=0.9, min_p=0.02),
}


def compute_processed_logprobs(sampling: Sampling, tokens: Tensor, logits: Tensor) -> Tensor:
    """Returns log-probabilities [V] after transformers' processors, in generate's order."""
    processors = [
        RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        TemperatureLogitsWarper(sampling.temperature),
    ]
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    scores = logits[None]
    for processor in processors:
        scores = processor(tokens[None], scores)
    return torch.log_softmax(scores[0], dim=-1)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_logprobs_are_those_of_the_distribution_that_was_cut(
    small_model: PreTrainedModel, device: Device, engine: str, cut: str
) -> None:
    """Compares each token with transformers' processors on a separate forward pass, and with the
    update's scores, so that the ratio is 1."""
    policy, sampling = wrap(small_model, device, end_ids=(2, 5, 50, 80)), CUTS[cut]
    prompts = draw_prompts(7, 3)
    rollout = ENGINES[engine](policy, 6, ROOM).generate(prompts, 3, sampling, seed=1)
    for n, prompt in enumerate(p for p in prompts for _ in range(3)):
        for c in range(int(rollout.lengths_N[n])):
            seen = torch.cat([torch.tensor(prompt.token_ids), rollout.tokens_NC[n, :c]])
            logits = small_model(seen[None]).logits[0, -1].detach()
            expected = compute_processed_logprobs(sampling, seen, logits)[rollout.tokens_NC[n, c]]
            assert_close(rollout.logprobs_NC[n, c], expected, atol=5e-5, rtol=1e-4)
    scored = score_rollout(policy, rollout, Readout(sampling), ROOM.forward_limit)
    assert_close(scored.logprobs, rollout.logprobs_NC, atol=5e-5, rtol=1e-4)
    uncut = score_plainly(policy, rollout, Sampling(sampling.temperature))
    assert_close(scored.plain_logprobs, uncut, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_cut_samples_follow_the_cut_distribution(
    small_model: PreTrainedModel, device: Device, engine: str, cut: str
) -> None:
    policy, prompt, sampling = wrap(small_model, device), draw_prompts(6), CUTS[cut]
    rollout = ENGINES[engine](policy, 1, ROOM).generate(prompt, 4000, sampling, seed=5)
    tokens = torch.tensor(prompt[0].token_ids)
    logits = small_model(tokens[None]).logits[0, -1].detach()
    expected = compute_processed_logprobs(sampling, tokens, logits).exp() * 4000
    counts = torch.bincount(rollout.tokens_NC[:, 0], minlength=97)
    assert (counts[expected == 0] == 0).all()
    common = expected >= 5
    chi_square = ((counts - expected)[common] ** 2 / expected[common]).sum()
    freedom = int(common.sum())
    assert chi_square < freedom + 3.8 * (2 * freedom) ** 0.5 + 15


def test_a_token_that_the_moved_policy_would_cut_still_has_a_logprob(
    small_model: PreTrainedModel, device: Device
) -> None:
    """Scoring adds a sampled token outside of top-k 1 to the kept ones, so that none is -inf."""
    policy = wrap(small_model, device)
    rollout = NativeEngine(policy, 8, ROOM).generate(draw_prompts(5), 20, Sampling(2.0), seed=0)
    scored = score_rollout(policy, rollout, Readout(Sampling(2.0, top_k=1)), ROOM.forward_limit)
    assert scored.logprobs.isfinite().all()
    assert (scored.logprobs[rollout.mask_NC] < -1).any()
    likeliest = scored.plain_logprobs[rollout.mask_NC] > -0.5
    assert (scored.entropy[rollout.mask_NC][likeliest] < 0.7).all()


def test_such_a_token_is_penalised_like_any_other() -> None:
    """A seen token outside of top-k 1 is added to the kept ones with its penalised logit."""
    logits_TV, seen_TV = torch.tensor([[4.0, 3.0, 1.0]]), torch.tensor([[False, True, False]])
    readout = Readout(Sampling(1.0, repetition_penalty=2.0, top_k=1))
    found = score_tokens(logits_TV, torch.tensor([1]), readout, seen_TV).logprobs
    assert_close(found, torch.tensor([1.5 - torch.logsumexp(torch.tensor([4.0, 1.5]), 0)]))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stop_string_ends_a_completion_and_stays_in_it(tiny: LanguageModel, engine: str) -> None:
    """A stop string may be a token, part of one or several; other completions don't change."""
    question = "<|im_start|>user\nWhat is 47 + 38?<|im_end|>\n<|im_start|>assistant\n"
    example = Example("q", "85", float)
    prompts = [Prompt("q", tuple(tiny.tokenizer.encode(question)), example)]
    make = ENGINES[engine](tiny, 24, ROOM)
    free = make.generate(prompts, 8, Sampling(1.0), seed=0)
    assert all("</answer>" in text for text in free.texts)
    for stop in ("</think>", "er>", "k><a", "<answer>"):
        stopped = make.generate(prompts, 8, Sampling(0.0, stop=(stop,)), seed=0)
        whole = make.generate(prompts, 1, Sampling(0.0), seed=0)
        for n, text in enumerate(stopped.texts):
            assert stop in text
            assert whole.texts[0].startswith(text)
            completion = stopped.tokens_NC[n, : stopped.lengths_N[n]]
            shorter = tiny.tokenizer.decode(completion[:-1].tolist(), skip_special_tokens=True)
            assert stop not in shorter
        assert not stopped.truncated_N.any()


def test_a_row_draws_the_same_whatever_is_drawn_beside_it(
    small_model: PreTrainedModel, device: Device
) -> None:
    """A row's tokens depend neither on the batches that fit into memory nor on ended rows."""
    policy = wrap(small_model, device, end_ids=(2, 5, 50, 80))
    prompts = draw_prompts(7, 3, 5, 4)
    together = NativeEngine(policy, 10, ROOM).generate(prompts, 5, Sampling(0.9), seed=4)
    for positions in (1, 37, 80):  # one row at a time, parts of a group, a group or two
        budget = Budget.from_tokens(positions)
        apart = NativeEngine(policy, 10, budget).generate(prompts, 5, Sampling(0.9), seed=4)
        assert together.lengths_N.tolist() == apart.lengths_N.tolist()
        assert torch.equal(together.tokens_NC, apart.tokens_NC)
        assert_close(together.logprobs_NC, apart.logprobs_NC, atol=2e-5, rtol=1e-4)


@settings(max_examples=200)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=6),
    st.integers(1, 7), st.integers(1, 30), st.integers(1, 300), st.booleans(),
)  # fmt: skip
def test_shares_hold_every_row_once_and_keep_to_the_limit(
    lengths: list[int], group: int, width: int, positions: int, unpadded: bool
) -> None:
    limit = Budget.from_tokens(positions).cache_limit
    left = [
        GroupPart(b, range(group)) for b in sorted(range(len(lengths)), key=lengths.__getitem__)
    ]
    seen = []
    while left:
        share, left = choose_next_batch(left, lengths, width, limit, unpadded)
        rows = share[0].rows
        longest = max(lengths[part.prompt] for part in share)
        size = len(share) * (longest + len(rows) * width)
        assert limit.started_tokens == size
        assert size <= positions or (len(share), len(rows)) == (1, 1)
        assert all(part.rows == rows for part in share)
        assert not unpadded or len({lengths[part.prompt] for part in share}) == 1
        seen += [(part.prompt, g) for part in share for g in part.rows]
    assert sorted(seen) == [(b, g) for b in range(len(lengths)) for g in range(group)]


def test_a_group_is_halved_where_memory_runs_out(
    small_model: PreTrainedModel, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prompt has 8 completions, of which memory holds 3: it samples 4, then 2, at a time."""
    policy = wrap(small_model, device, end_ids=(2,))
    budget, sizes, whole = Budget.from_tokens(1000), [], NativeEngine._sample

    def sample_few(engine: NativeEngine, prompts: Any, uniform_NC: Tensor, *rest: Any) -> Any:
        sizes.append(len(uniform_NC))
        if len(uniform_NC) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(engine, prompts, uniform_NC, *rest)

    expected = NativeEngine(policy, 10, ROOM).generate(draw_prompts(6), 8, Sampling(1.0), seed=1)
    monkeypatch.setattr(NativeEngine, "_sample", sample_few)
    found = NativeEngine(policy, 10, budget).generate(draw_prompts(6), 8, Sampling(1.0), seed=1)
    assert sizes[0] == 8
    assert max(sizes[-3:]) <= 3
    assert torch.equal(found.tokens_NC, expected.tokens_NC)


def test_a_token_that_was_cut_is_never_drawn() -> None:
    """Tries the uniform numbers 0, one just below 1, and one at the last token's rounding error."""
    logits_NV = torch.tensor([[1.0, 3.0, 2.0, -1.0, 0.5]]).repeat(3, 1)
    uniform_N = torch.tensor([0.0, 0.5, 1 - 2**-24])
    for k in (1, 2, 3):
        token_N, logprob_N = sample_tokens(logits_NV, Sampling(1.0, top_k=k), None, uniform_N)
        kept = logits_NV[0].topk(k).indices
        assert torch.isin(token_N, kept).all()
        expected = torch.log_softmax(logits_NV[0][kept], 0)
        for token, logprob in zip(token_N.tolist(), logprob_N.tolist(), strict=True):
            assert logprob == pytest.approx(float(expected[kept == token]), abs=1e-6)


def test_a_token_is_where_the_cumulated_probabilities_pass_the_number() -> None:
    """Works out the tokens for the probabilities 1/2, 1/8 and 3/8 by hand."""
    logits_NV = torch.tensor([[0.5, 0.125, 0.375]]).log().repeat(5, 1)
    uniform_N = torch.tensor([0.0, 0.49, 0.51, 0.62, 0.63])
    token_N, logprob_N = sample_tokens(logits_NV, Sampling(1.0), None, uniform_N)
    assert token_N.tolist() == [0, 0, 1, 1, 2]
    assert_close(logprob_N.exp(), torch.tensor([0.5, 0.5, 0.125, 0.125, 0.375]))
