"""The policy's forward pass over completions, with each group's prompt computed once.

`forward_shared_prompt` and `forward_plain` compute the same numbers. The first is normally used; it
is checked against the second when a model is loaded, and the second is used if they differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.errors import ConfigError
from grpo.models.attention import TreePlan, compute_hidden_states
from grpo.models.head import Features, Head, Readout, TokenScores, score_in_chunks
from grpo.models.padding import gather_rows
from grpo.models.sampling_filters import KeptTokens, filter_logits
from grpo.models.tree import Tree
from grpo.types import Sampling


@dataclass(frozen=True)
class Completions:
    """A slice of a rollout: R completions for each of B' prompts; row b*R+r continues prompt b."""

    prompts_BP: Tensor  # int64, left-padded
    prompt_lengths_B: Tensor
    tokens_NC: Tensor  # int64, right-padded
    mask_NC: Tensor  # bool
    rows_N: Tensor | None = None  # the indices of these rows in the rollout
    # The tokens that sampling may draw, if they are fixed for the whole rollout.
    kept_tokens: KeptTokens | None = None

    @property
    def rows_per_prompt(self) -> int:
        """R, the number of completions of each prompt."""
        return self.tokens_NC.shape[0] // self.prompts_BP.shape[0]

    def select_rows(self, rows: slice) -> Completions:
        """Returns these rows, each with its own copy of its prompt."""
        prompt_N = torch.arange(len(self.tokens_NC), device=self.tokens_NC.device)[rows]
        prompt_N //= self.rows_per_prompt
        return Completions(
            self.prompts_BP[prompt_N],
            self.prompt_lengths_B[prompt_N],
            self.tokens_NC[rows],
            self.mask_NC[rows],
            None if self.rows_N is None else self.rows_N[rows],
            self.kept_tokens,
        )

    def filter_logits(self, chunk: slice, logits_TV: Tensor, sampling: Sampling) -> Tensor:
        """Returns logits [T', V] of a chunk of the completion tokens, -inf for filtered tokens."""
        if self.kept_tokens is None or self.rows_N is None:
            return filter_logits(logits_TV, sampling)
        row_T, column_T = (index[chunk] for index in self.mask_NC.nonzero(as_tuple=True))
        return self.kept_tokens.filter_logits(self.rows_N[row_T], column_T, logits_TV, sampling)

    def mark_seen(self, chunk: slice, vocabulary: int) -> Tensor:
        """Returns [T', V] bool: the vocabulary that occurs before each completion token of a chunk.

        Args:
            chunk: of the T tokens that mask_NC selects.
        """
        row_T, column_T = (index[chunk] for index in self.mask_NC.nonzero(as_tuple=True))
        prompt_mask_BP = left_mask(self.prompts_BP, self.prompt_lengths_B).bool()
        prompt_T = row_T // self.rows_per_prompt
        tokens = torch.cat([self.prompts_BP[prompt_T], self.tokens_NC[row_T]], dim=1)
        columns_C = torch.arange(self.tokens_NC.shape[1], device=tokens.device)
        before_TC = columns_C < column_T[:, None]
        before = torch.cat([prompt_mask_BP[prompt_T], before_TC], dim=1)
        counts_TV = torch.zeros(len(row_T), vocabulary, device=tokens.device)
        return counts_TV.scatter_add_(1, tokens, before.float()) > 0


Forward = Callable[[PreTrainedModel, Head, Completions], Features]


def left_mask(prompts_BP: Tensor, lengths_B: Tensor) -> Tensor:
    """Returns [B, P] int64: 1 on the last `length` positions of each row, else 0."""
    width = prompts_BP.shape[1]
    positions_P = torch.arange(width, device=prompts_BP.device)
    return (positions_P >= width - lengths_B[:, None]).long()


def position_ids(mask: Tensor) -> Tensor:
    """Returns the position of each real token, counted from 0 after the padding on its left."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


def forward_shared_prompt(model: PreTrainedModel, head: Head, batch: Completions) -> Features:
    """Returns the hidden state that predicts each completion token, in the order of rows.

    The model reads all prompts and completions as one row: each prompt occurs once, its completions
    attend to it, and gradients flow through it. The head reads only completion tokens.
    """
    prompt_mask_BP = left_mask(batch.prompts_BP, batch.prompt_lengths_B).bool()
    read_NC = batch.mask_NC[:, 1:]  # a completion's last token is predicted but not read
    tree = Tree(tuple(batch.prompt_lengths_B.tolist()), tuple(read_NC.sum(dim=1).tolist()))
    tokens_T = torch.cat([batch.prompts_BP[prompt_mask_BP], batch.tokens_NC[:, :-1][read_NC]])
    hidden_TD = compute_hidden_states(
        model, tokens_T, tree.positions(tokens_T.device), TreePlan(tree)
    )
    values_TX = gather_rows(hidden_TD, find_predictors(tree, batch.mask_NC))
    return Features(values_TX, head.keep_rounded_weight(), head.vocabulary)


def find_predictors(tree: Tree, mask_NC: Tensor) -> Tensor:
    """Returns the index in the tree of the token before each completion token, which predicts it.

    For the first token of a completion, this is the last token of its prompt.
    """
    starts = torch.tensor([part.start for part in tree.completion_slices], device=mask_NC.device)
    source_NC = starts[:, None] + torch.arange(mask_NC.shape[1], device=mask_NC.device) - 1
    roots = torch.tensor([part.stop - 1 for part in tree.prompt_slices], device=mask_NC.device)
    source_NC[:, 0] = roots.repeat_interleave(tree.rows_per_prompt)
    return source_NC[mask_NC]


def forward_plain(model: PreTrainedModel, head: Head, batch: Completions) -> Features:
    """Returns the logits at each completion token in the usual way: each row has its own prompt.

    It runs prompts of one length at a time, so that no row has padding on the left: some models,
    such as RWKV, ignore the attention mask.
    """
    rows_R = torch.arange(batch.rows_per_prompt, device=batch.tokens_NC.device)
    row_T = batch.mask_NC.nonzero()[:, 0]
    logits_parts: list[Tensor] = []
    places: list[Tensor] = []
    for length in batch.prompt_lengths_B.unique().tolist():
        prompts = (batch.prompt_lengths_B == length).nonzero()[:, 0]
        row_N = (prompts[:, None] * len(rows_R) + rows_R).flatten()
        tokens_NC, mask_NC = batch.tokens_NC[row_N], batch.mask_NC[row_N]
        prompts_NP = batch.prompts_BP[prompts, -length:].repeat_interleave(len(rows_R), dim=0)
        tokens = torch.cat([prompts_NP, tokens_NC], dim=1)
        mask = torch.cat([torch.ones_like(prompts_NP), mask_NC.long()], dim=1)
        logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        logits_parts.append(logits[:, length - 1 : -1][mask_NC])
        places.append(torch.isin(row_T, row_N).nonzero()[:, 0])
    logits_TV = gather_rows(torch.cat(logits_parts), torch.cat(places).argsort())
    return Features(logits_TV, Tensor.float, logits_TV.shape[-1])


def score_completions(
    features: Features, batch: Completions, readout: Readout, reference: Features | None = None
) -> TokenScores:
    """Returns scores [N, C] of a batch's completion tokens; zeros on padding."""

    def seen(chunk: slice) -> Tensor:
        return batch.mark_seen(chunk, features.vocabulary)

    penalised = readout.sampling.repetition_penalty != 1
    scores = score_in_chunks(
        features,
        batch.tokens_NC[batch.mask_NC],
        readout,
        seen if penalised else None,
        reference,
        partial(batch.filter_logits, sampling=readout.sampling),
    )
    return TokenScores(*(scatter(part, batch.mask_NC) for part in scores))


def scatter(values_T: Tensor, mask_NC: Tensor) -> Tensor:
    """Puts values [T] into their places in [N, C], with zeros elsewhere."""
    return torch.zeros(mask_NC.shape, dtype=values_T.dtype, device=values_T.device).masked_scatter(
        mask_NC, values_T
    )


def make_random_completions(vocabulary: int, device: torch.device) -> Completions:
    """Makes two prompts of different lengths with two completions each, one of them shorter."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (2, 16), generator=generator).to(device)
    mask_NC = torch.ones(4, 4, dtype=torch.bool, device=device)
    mask_NC[1, 2:] = False
    lengths_B = torch.tensor([8, 5], device=device)
    return Completions(tokens[:, :8], lengths_B, tokens[:, 8:].reshape(4, 4), mask_NC)


# Errors of models without a part that is asked for, such as state-space models without attention.
FORWARD_ERRORS = (
    AttributeError,
    IndexError,
    NotImplementedError,
    TypeError,
    ValueError,
    RuntimeError,
)


@torch.no_grad()
def find_sharing_problem(model: PreTrainedModel, head: Head) -> str:
    """Returns why `forward_shared_prompt` doesn't compute the model's numbers; empty if it does.

    A model may change its logits after the head, or keep a state that can't be shared by a group.
    Models don't declare this, so it is measured on random tokens each time a model is loaded.

    Raises:
        ConfigError: the model's logits are NaN or infinite.
    """
    batch = make_random_completions(head.vocabulary, model.device)
    readout = Readout(Sampling(temperature=0.7))
    expected = score_completions(forward_plain(model, head, batch), batch, readout).logprobs
    if not bool(expected.isfinite().all()):
        raise ConfigError(
            f"{type(model).__name__}: its logits are NaN or infinite, so the weights of this "
            f"checkpoint are broken or in another precision than it says; use another checkpoint."
        )
    try:
        ours = score_completions(forward_shared_prompt(model, head, batch), batch, readout).logprobs
    except FORWARD_ERRORS as error:
        return f"{type(error).__name__}: {error}"
    if match_logprobs(ours, expected):
        return ""
    return f"off by {float((ours - expected).abs().max()):.2g} nats"


@torch.no_grad()
def reads_padding(model: PreTrainedModel, head: Head) -> bool:
    """Returns whether left padding changes the model's predictions, measured on random tokens."""
    batch = make_random_completions(head.vocabulary, model.device)
    mask = left_mask(batch.prompts_BP, batch.prompt_lengths_B)
    options: dict[str, Tensor] = {}
    # The same check as in `generate`.
    if "position_ids" in inspect.signature(model.forward).parameters:
        options["position_ids"] = position_ids(mask)
    padded = model(
        input_ids=batch.prompts_BP, attention_mask=mask, use_cache=False, **options
    ).logits[:, -1]
    first = Completions(
        batch.prompts_BP, batch.prompt_lengths_B, batch.tokens_NC[::2, :1], batch.mask_NC[::2, :1]
    )
    alone = forward_plain(model, head, first).values_TX
    ours, theirs = (logits.float().log_softmax(dim=-1) for logits in (padded, alone))
    return not match_logprobs(ours, theirs)


def match_logprobs(ours: Tensor, theirs: Tensor, in_fp32: bool = True) -> bool:
    """Returns whether two computations of log-probabilities differ by no more than rounding."""
    if in_fp32:
        return bool(torch.allclose(ours, theirs, atol=1e-3, rtol=1e-3))
    # With bf16's 8 bits single tokens may differ a lot, but not all of them; large logits do more.
    size = float(theirs.abs().mean())
    return float((ours - theirs).abs().mean()) <= max(0.1, 0.02 * size)


def computes_in_fp32(model: PreTrainedModel) -> bool:
    """Returns whether the model is in fp32, not quantized, and autocast is off."""
    return (
        model.dtype == torch.float32
        and not getattr(model, "is_quantized", False)
        and not torch.is_autocast_enabled(model.device.type)
    )
