"""The language-model head, read in chunks: the full [N, C, V] logits never exist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grpo.models import sampling_filters
from grpo.models.cpu.linear import compute_dtype, wide_product
from grpo.models.logprobs import HeadOptions, split_into_chunks, token_logprobs
from grpo.types import Sampling

# Logits held at once, in fp32: a GPU's memory is large, and its products want many rows.
CHUNK_LOGITS = {"cpu": 2**23, "mps": 2**23, "cuda": 2**26}


class Head:
    """Hidden states to logits, as the model itself makes them: with its own cap and scale."""

    def __init__(self, model: nn.Module) -> None:
        self.linear = cast(nn.Module, model.get_output_embeddings())  # type: ignore[operator]
        config = model.config
        self.cap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        self.vocabulary = int(self.linear.weight.shape[0])  # type: ignore[index]

    @property
    def weight(self) -> Tensor | None:
        """[V, D] where the product with it is all that the layer does."""
        plain = type(self.linear) is nn.Linear and self.linear.bias is None
        return cast(Tensor, self.linear.weight) if plain else None

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., V], float32: nothing is rounded on the way to the softmax."""
        weight = self.weight
        if weight is not None and compute_dtype(hidden) != torch.float32:
            logits = wide_product(hidden, weight)
        else:
            logits = self.linear(hidden).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


class Features(NamedTuple):
    """What a forward pass knows of each of T tokens, and how to read logits [T', V] out of it."""

    values_TX: Tensor
    to_logits: Callable[[Tensor], Tensor]
    vocabulary: int

    @property
    def chunk_size(self) -> int:
        """Tokens whose logits are held at once."""
        return max(1, CHUNK_LOGITS[self.values_TX.device.type] // self.vocabulary)

    def select_tokens(self, tokens: slice) -> Features:
        return self._replace(values_TX=self.values_TX[tokens])

    def select_detached(self, tokens: slice) -> Features:
        """A part whose gradient goes no further than its own values."""
        values_TX = self.values_TX[tokens].detach()
        return self._replace(values_TX=values_TX.requires_grad_(self.values_TX.requires_grad))


@dataclass(frozen=True)
class Readout:
    """What is asked of each token's distribution."""

    sampling: Sampling
    entropy_gradient: bool = False
    divergence: Callable[[Tensor, Tensor], Tensor] | None = None  # of [T, V] log-probabilities

    @property
    def is_plain_softmax(self) -> bool:
        """Nothing but log-probabilities under softmax(logits / temperature) has a gradient."""
        return not (
            self.sampling.alters_distribution
            or self.entropy_gradient
            or self.divergence is not None
        )


class TokenScores(NamedTuple):
    """What a model says of given tokens; any one shape, float32."""

    logprobs: Tensor  # of those tokens, under the distribution that is sampled from
    plain_logprobs: (
        Tensor  # and under softmax(logits / temperature): the same where sampling cuts nothing
    )
    entropy: Tensor  # nats, of the distribution that is sampled from
    divergence: Tensor  # from the reference, over the whole vocabulary; 0 where none is asked for
    reference: Tensor  # the reference's log-probability of the token, where a divergence is


def score_in_chunks(
    features: Features,
    targets_T: Tensor,
    readout: Readout,
    mark_seen: Callable[[slice], Tensor] | None = None,
    reference: Features | None = None,
    filter_logits: Callable[[slice, Tensor], Tensor] | None = None,
) -> TokenScores:
    """Scores [T] of the tokens that were sampled.

    The rows are read in chunks; where there is more than one, their logits are made again in the
    backward pass, so memory does not grow with T times V.

    Args:
        seen: for a slice of T, which tokens stood before each: [T', V] bool; for a penalty.
        reference: the same tokens as the reference sees them; for a divergence.
        cut: puts what sampling leaves out of a slice's logits [T', V] at -inf; None: as
            `sampling_filters.filter_logits` does.
    """
    rows = features.chunk_size
    if (
        isinstance(features.to_logits, Head)
        and features.to_logits.weight is not None
        and readout.is_plain_softmax
    ):
        head, weight_VD = features.to_logits, features.to_logits.weight
        shape = HeadOptions(head.scale, head.cap, readout.sampling.temperature or 1.0, rows)
        logprobs_T, entropy_T = token_logprobs(features.values_TX, weight_VD, targets_T, shape)
        nothing_T = torch.zeros_like(logprobs_T)
        return TokenScores(logprobs_T, logprobs_T, entropy_T, nothing_T, nothing_T)

    def read(values_TX: Tensor, chunk: slice) -> TokenScores:
        against_TV = None
        if reference is not None and readout.divergence is not None:
            with torch.no_grad():
                logits_TV = reference.to_logits(reference.values_TX[chunk])
                against_TV = (logits_TV / (readout.sampling.temperature or 1.0)).log_softmax(-1)
        seen_TV = None if mark_seen is None else mark_seen(chunk)
        return score_tokens(
            features.to_logits(values_TX),
            targets_T[chunk],
            readout,
            seen_TV,
            against_TV,
            None if filter_logits is None else partial(filter_logits, chunk),
        )

    chunks = []
    for chunk in split_into_chunks(len(targets_T), rows):
        values_TX = features.values_TX[chunk]
        if values_TX.requires_grad and len(targets_T) > rows:
            chunks.append(checkpoint(read, values_TX, chunk, use_reentrant=False))
        else:
            chunks.append(read(values_TX, chunk))
    return TokenScores(*(torch.cat(part) for part in zip(*chunks, strict=True)))


def score_tokens(
    logits_TV: Tensor,
    targets_T: Tensor,
    readout: Readout,
    seen_TV: Tensor | None = None,
    reference_TV: Tensor | None = None,
    filter_logits: Callable[[Tensor], Tensor] | None = None,
) -> TokenScores:
    """Scores [T] from logits that are there in full.

    A token that was sampled always counts as one that can be: by rounding it may fall just outside
    of what top-p leaves, and its log-probability must not be -inf.

    Args:
        cut: as in `score_in_chunks`, for all of them.
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
        divided_TV = sampling_filters.scale_logits(logits_TV, readout.sampling, seen_TV)
        inside_T1 = divided_TV.gather(-1, targets_T1)
        left_TV = (
            sampling_filters.filter_logits(divided_TV, readout.sampling)
            if filter_logits is None
            else filter_logits(divided_TV)
        )
        scaled_TV = left_TV.scatter(-1, targets_T1, inside_T1)
        normalizer_T = scaled_TV.logsumexp(dim=-1)
        logprobs_T = inside_T1[:, 0] - normalizer_T
    with torch.set_grad_enabled(readout.entropy_gradient and torch.is_grad_enabled()):
        all_logprobs_TV = scaled_TV - normalizer_T[:, None]
        if readout.sampling.alters_distribution:  # 0 times -inf is no number; e^-100 is 0 too
            all_logprobs_TV = all_logprobs_TV.clamp(min=-100.0)
        entropy_T = -(all_logprobs_TV.exp() * all_logprobs_TV).sum(dim=-1)
    return TokenScores(logprobs_T, plain_T, entropy_T, divergence_T, reference_T)
