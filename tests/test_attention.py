"""Compares a tree's attention, split or expanded, with that of each path from root to leaf."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from grpo.models.attention import attend_expanded
from grpo.models.attention_plan import AttentionScoring
from grpo.models.cpu.tree_attention import attend_split
from grpo.models.tree import Tree
from grpo.rollout.cache import KVCache

HEADS, KEY_HEADS, WIDTH = 6, 2, 8


def draw_tensors(tree: Tree, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Makes queries, keys and values of a tree's tokens, in float64."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tree.prompt_tokens + sum(tree.lengths)

    def draw_normal(heads: int) -> Tensor:
        drawn = torch.randn(heads, tokens, WIDTH, generator=generator, dtype=torch.float64)
        return drawn.requires_grad_()

    return draw_normal(HEADS), draw_normal(KEY_HEADS), draw_normal(KEY_HEADS)


def compute_attention(
    queries: Tensor, keys: Tensor, values: Tensor, tree: Tree, how: AttentionScoring
) -> Tensor:
    """Computes attention [T, H, d] by its definition, for one token and one head at a time."""
    out = torch.zeros(queries.shape[1], HEADS, WIDTH, dtype=queries.dtype)
    sequences = [list(range(part.start, part.stop)) for part in tree.prompt_slices]
    places = [(sequence, i) for sequence in sequences for i in range(len(sequence))]
    for n, part in enumerate(tree.completion_slices):
        root = sequences[n // tree.rows_per_prompt]
        whole = root + list(range(part.start, part.stop))
        places += [(whole, i) for i in range(len(root), len(whole))]
    for sequence, i in places:
        visible = (
            sequence[: i + 1]
            if how.window is None
            else sequence[max(0, i + 1 - how.window) : i + 1]
        )
        for head in range(HEADS):
            key_head = head // (HEADS // KEY_HEADS)
            scores = keys[key_head, visible] @ queries[head, sequence[i]] * how.scale
            if how.softcap is not None:
                scores = torch.tanh(scores / how.softcap) * how.softcap
            out[sequence[i], head] = scores.softmax(0) @ values[key_head, visible]
    return out


TREES = st.tuples(st.integers(1, 3), st.integers(1, 3)).flatmap(
    lambda shape: st.builds(
        Tree,
        st.tuples(*[st.integers(1, 5)] * shape[0]),
        st.tuples(*[st.integers(0, 4)] * (shape[0] * shape[1])),
    )
)


@settings(max_examples=25)
@given(tree=TREES)
def test_pieces_put_together_are_the_whole_with_its_gradients(tree: Tree) -> None:
    how = AttentionScoring(scale=0.3)
    queries, keys, values = draw_tensors(tree)
    joined, whole = (
        attend_split(queries, keys, values, tree, 0.3),
        compute_attention(queries, keys, values, tree, how),
    )
    assert_close(joined, whole)
    weight = torch.randn(joined.shape, generator=torch.Generator().manual_seed(1)).double()
    found = torch.autograd.grad((joined * weight).sum(), (queries, keys, values))
    expected = torch.autograd.grad((whole * weight).sum(), (queries, keys, values))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


@settings(max_examples=25)
@given(
    tree=TREES,
    window=st.none() | st.integers(1, 6),
    softcap=st.none() | st.sampled_from([0.5, 5.0]),
)
def test_expanded_is_the_definition(tree: Tree, window: int | None, softcap: float | None) -> None:
    how = AttentionScoring(0.3, window, softcap)
    queries, keys, values = draw_tensors(tree)
    assert_close(
        attend_expanded(queries, keys, values, tree, how),
        compute_attention(queries, keys, values, tree, how),
        check_dtype=False,
        atol=2e-6,  # with a soft cap, the softmax is in fp32
        rtol=1e-5,
    )


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_one_token_at_a_time_is_the_same_as_all_at_once(
    window: int | None, softcap: float | None
) -> None:
    """Attends through the cache while rows are dropped, with unequal prompts and groups."""
    tree = Tree((5, 3, 4), (6,) * 9)
    how = AttentionScoring(0.3, window, softcap)
    queries, keys, values = (x.detach().float() for x in draw_tensors(tree))
    expected = compute_attention(queries, keys, values, tree, how)
    cache = KVCache(tree.prompt_lengths, tree.rows_per_prompt, 6, torch.device("cpu"))
    prompts = slice(0, tree.prompt_tokens)
    cache.store_prompts(0, 0, keys[:, prompts], values[:, prompts], Tree(tree.prompt_lengths, ()))
    alive = list(range(9))
    for column in range(6):
        if column in (2, 4):
            keep = torch.tensor([0, 2, 3, 6, 7] if column == 2 else [1, 3])
            cache.keep_rows(keep)
            alive = [alive[n] for n in keep.tolist()]
        places = [tree.completion_slices[n].start + column for n in alive]
        found = cache.attend(0, queries[:, places], keys[:, places], values[:, places], how)
        assert_close(found, expected[places], atol=1e-5, rtol=1e-5)
        positions = [tree.prompt_lengths[n // 3] + column for n in alive]
        assert cache.next_positions().tolist() == positions
        cache.num_written += 1
    assert alive == [2, 6]  # rows of the first and the last prompt; the second is dropped
