"""The language-model head, computed in chunks, so that the full logits [N, C, V] never exist."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grpo.models import sampling_filters
from grpo.models.cpu.linear import PackedLinear, RoundedWeight, compute_dtype, wide_product
from grpo.models.logprobs import HeadOptions, split_into_chunks, token_logprobs
from grpo.types import Sampling

# How many fp32 logits are held at once; more on a GPU, which has memory and needs many rows.
CHUNK_LOGITS = {"cpu": 2**23, "mps": 2**23, "cuda": 2**26}


class Head:
    """Computes logits from hidden states like the model itself, with its soft cap and scale."""

    def __init__(self, model: nn.Module) -> None:
        self.linear = cast(nn.Module, model.get_output_embeddings())  # type: ignore[operator]
        config = model.config
        self.cap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        self.vocabulary = int(self.linear.weight.shape[0])  # type: ignore[index]
        self._rounded: RoundedWeight | None = None
        self._keeps_rounded = False

    @property
    def weight(self) -> Tensor | None:
        """The weight [V, D] if the layer is a plain product with it, else None."""
        plain = type(self.linear) is nn.Linear and self.linear.bias is None
        return cast(Tensor, self.linear.weight) if plain else None

    def keep_rounded_weight(self) -> Head:
        """Returns a head that rounds the weight once, at its first use; see `get_rounded_weight`.

        It is for the chunks of one forward pass: the weight must not change while it is used.
        """
        head = copy(self)
        head._keeps_rounded = True
        return head

    def get_rounded_weight(self, dtype: torch.dtype) -> RoundedWeight | None:
        """Returns the weight in the precision of products; None if this head doesn't keep it."""
        if self._keeps_rounded and self._rounded is None and self.weight is not None:
            self._rounded = RoundedWeight(self.weight, dtype)
        return self._rounded

    def __call__(self, hidden: Tensor) -> Tensor:
        """Returns fp32 logits [..., V] of hidden states [..., D]; sums are not rounded to bf16."""
        weight = self.weight
        packed = isinstance(self.linear.__dict__.get("forward"), PackedLinear)
        if weight is not None and compute_dtype(hidden) != torch.float32 and not packed:
            logits = wide_product(hidden, weight)
        else:
            logits = self.linear(hidden).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


class Features(NamedTuple):
    """A forward pass's output for T tokens, from which logits [T', V] are computed in chunks."""

    values_TX: Tensor  # hidden states, or the logits themselves
    to_logits: Callable[[Tensor], Tensor]  # [T', X] -> [T', V]
    vocabulary: int

    @property
    def chunk_size(self) -> int:
        """The number of tokens whose logits are held at once."""
        return max(1, CHUNK_LOGITS[self.values_TX.device.type] // self.vocabulary)

    def select_tokens(self, tokens: slice) -> Features:
        """Returns the features of a slice of the tokens."""
        return self._replace(values_TX=self.values_TX[tokens])

    def select_detached(self, tokens: slice) -> Features:
        """Returns the features of a slice of the tokens, detached from the forward pass."""
        values_TX = self.values_TX[tokens].detach()
        return self._replace(values_TX=values_TX.requires_grad_(self.values_TX.requires_grad))


@dataclass(frozen=True)
class Readout:
    """Which numbers to compute from each token's distribution."""

    sampling: Sampling
    entropy_gradient: bool = False  # whether the entropy has a gradient
    # From the policy's and the reference's log-probabilities [T, V] to [T]; None: not computed.
    divergence: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def is_plain_softmax(self) -> bool:
        """Whether only log-probabilities under softmax(logits / temperature) need a gradient."""
        return not (
            self.sampling.alters_distribution
            or self.entropy_gradient
            or self.divergence is not None
        )


class TokenScores(NamedTuple):
    """A model's scores of tokens; all fields are float32 and have the same shape."""

    logprobs: Tensor  # under the distribution that is sampled from
    plain_logprobs: Tensor  # under softmax(logits / temperature), without penalty and filters
    entropy: Tensor  # nats, of the distribution that is sampled from
    divergence: Tensor  # from the reference, over the whole vocabulary; 0 if it isn't computed
    reference: Tensor  # the reference's log-probabilities; 0 if no divergence is computed


def score_in_chunks(
    features: Features,
    targets_T: Tensor,
    readout: Readout,
    mark_seen: Callable[[slice], Tensor] | None = None,
    reference: Features | None = None,
    filter_logits: Callable[[slice, Tensor], Tensor] | None = None,
) -> TokenScores:
    """Returns the scores [T] of the target tokens.

    Logits are computed in chunks. If there are several, the backward pass computes them again, so
    memory doesn't grow with T times V.

    Args:
        mark_seen: for a slice of T, returns [T', V] bool: the tokens that occur before each; for a
            repetition penalty.
        reference: the reference's features of the same tokens, for a divergence.
        filter_logits: sets a slice's logits [T', V] of tokens that sampling can't draw to -inf;
            None uses `sampling_filters.filter_logits`.
    """
    rows = features.chunk_size
    if (
        isinstance(features.to_logits, Head)
        and features.to_logits.weight is not None
        and readout.is_plain_softmax
    ):
        head, weight_VD = features.to_logits, features.to_logits.weight
        options = HeadOptions(head.scale, head.cap, readout.sampling.temperature or 1.0, rows)
        rounded = head.get_rounded_weight(compute_dtype(features.values_TX))
        logprobs_T, entropy_T = token_logprobs(
            features.values_TX, weight_VD, targets_T, options, rounded
        )
        zeros_T = torch.zeros_like(logprobs_T)
        return TokenScores(logprobs_T, logprobs_T, entropy_T, zeros_T, zeros_T)

    def score_chunk(values_TX: Tensor, chunk: slice) -> TokenScores:
        reference_TV = None
        if reference is not None and readout.divergence is not None:
            with torch.no_grad():
                logits_TV = reference.to_logits(reference.values_TX[chunk])
                reference_TV = (logits_TV / (readout.sampling.temperature or 1.0)).log_softmax(-1)
        seen_TV = None if mark_seen is None else mark_seen(chunk)
        return score_tokens(
            features.to_logits(values_TX),
            targets_T[chunk],
            readout,
            seen_TV,
            reference_TV,
            None if filter_logits is None else partial(filter_logits, chunk),
        )

    chunks = []
    for chunk in split_into_chunks(len(targets_T), rows):
        values_TX = features.values_TX[chunk]
        if values_TX.requires_grad and len(targets_T) > rows:
            chunks.append(checkpoint(score_chunk, values_TX, chunk, use_reentrant=False))
        else:
            chunks.append(score_chunk(values_TX, chunk))
    return TokenScores(*(torch.cat(part) for part in zip(*chunks, strict=True)))


def score_tokens(
    logits_TV: Tensor,
    targets_T: Tensor,
    readout: Readout,
    seen_TV: Tensor | None = None,
    reference_TV: Tensor | None = None,
    filter_logits: Callable[[Tensor], Tensor] | None = None,
) -> TokenScores:
    """Returns the scores [T] of the target tokens from their logits [T, V].

    A target always counts as a token that sampling keeps: due to rounding, it may fall just outside
    of top-p, and its log-probability must not be -inf.

    Args:
        seen_TV: bool, the tokens that occur before each, for a repetition penalty.
        reference_TV: the reference's log-probabilities, for a divergence.
        filter_logits: as in `score_in_chunks`, for all T tokens.
    """
    targets_T1 = targets_T[:, None]
    scaled_TV = logits_TV / (readout.sampling.temperature or 1.0)
    normalizer_T = scaled_TV.logsumexp(dim=-1)
    plain_T = logprobs_T = scaled_TV.gather(-1, targets_T1)[:, 0] - normalizer_T
    divergence_T = reference_T = torch.zeros_like(plain_T)
    if reference_TV is not None and readout.divergence is not None:
        divergence_T = readout.divergence(scaled_TV - normalizer_T[:, None], reference_TV)
        reference_T = reference_TV.gather(-1, targets_T1)[:, 0]
    if readout.sampling.alters_distribution:
        penalised_TV = sampling_filters.scale_logits(logits_TV, readout.sampling, seen_TV)
        target_logits_T1 = penalised_TV.gather(-1, targets_T1)
        filtered_TV = (
            sampling_filters.filter_logits(penalised_TV, readout.sampling)
            if filter_logits is None
            else filter_logits(penalised_TV)
        )
        scaled_TV = filtered_TV.scatter(-1, targets_T1, target_logits_T1)
        normalizer_T = scaled_TV.logsumexp(dim=-1)
        logprobs_T = target_logits_T1[:, 0] - normalizer_T
    with torch.set_grad_enabled(readout.entropy_gradient and torch.is_grad_enabled()):
        all_logprobs_TV = scaled_TV - normalizer_T[:, None]
        if readout.sampling.alters_distribution:  # 0 · -inf is NaN; e^-100 is 0 too
            all_logprobs_TV = all_logprobs_TV.clamp(min=-100.0)
        entropy_T = -(all_logprobs_TV.exp() * all_logprobs_TV).sum(dim=-1)
    return TokenScores(logprobs_T, plain_T, entropy_T, divergence_T, reference_T)
