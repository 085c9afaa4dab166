"""The language-model head, read in chunks: the full [N, C, V] logits never exist."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**24  # logits held at once: 64 MB in fp32


class TokenScores(NamedTuple):
    """What the head says of given tokens; any one shape."""

    logprobs: Tensor  # float32, of those tokens
    entropy: Tensor  # float32, nats, of the distributions they were drawn from; no gradient


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

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., V], float32."""
        logits = self.linear(hidden).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def score(self, hidden_TD: Tensor, targets_T: Tensor, temperature: float) -> TokenScores:
        """Log-probabilities of `targets_T` under softmax(logits / temperature).

        The rows are read in chunks whose logits are made again in the backward pass, so memory
        does not grow with T times V.
        """
        rows = max(1, CHUNK_LOGITS // self.vocabulary)
        chunks = [
            checkpoint(self._score_chunk, hidden, targets, temperature, use_reentrant=False)
            if hidden_TD.requires_grad
            else self._score_chunk(hidden, targets, temperature)
            for hidden, targets in zip(hidden_TD.split(rows), targets_T.split(rows), strict=True)
        ]
        return TokenScores(*(torch.cat(part) for part in zip(*chunks, strict=True)))

    def _score_chunk(self, hidden_TD: Tensor, targets_T: Tensor, temperature: float) -> TokenScores:
        return score_tokens(self(hidden_TD), targets_T, temperature)


def score_tokens(logits_TV: Tensor, targets_T: Tensor, temperature: float) -> TokenScores:
    """Log-probabilities and entropies from logits that are there in full."""
    scaled_TV = logits_TV / temperature
    normalizer_T = scaled_TV.logsumexp(dim=-1)
    logprobs_T = scaled_TV.gather(-1, targets_T[..., None])[..., 0] - normalizer_T
    with torch.no_grad():
        probabilities_TV = torch.exp(scaled_TV - normalizer_T[..., None])
        entropy_T = normalizer_T - (probabilities_TV * scaled_TV).sum(dim=-1)
    return TokenScores(logprobs_T, entropy_T)
