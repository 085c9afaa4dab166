"""Log-probabilities of tokens directly from hidden states, for the usual softmax head.

They equal those of `head.score_tokens`, but the backward pass is written by hand: it overwrites
logits with their gradient, and the gradient of log softmax(z)_t is onehot(t) - softmax(z). A single
chunk of logits is kept from the forward to the backward pass; several chunks are computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo.models.cpu.linear import (
    RoundedWeight,
    add_to_gradient,
    compute_dtype,
    multiply_gradient,
)

CACHED_LOGITS = 2**21  # 8 MB in fp32, which stay in a CPU's cache while they are read repeatedly


@dataclass(frozen=True)
class HeadOptions:
    """What a head applies to the product with its weight, in this order, and its chunk size."""

    scale: float
    cap: float | None  # z becomes cap · tanh(z / cap)
    temperature: float  # divides the logits
    chunk_size: int  # tokens whose logits are held at once


def token_logprobs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    options: HeadOptions,
    rounded: RoundedWeight | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the targets' log-probabilities [T] and entropies [T] in fp32.

    The entropies have no gradient.

    Args:
        rounded: the weight in the precision of products; None rounds it here.
    """
    rounded = rounded or RoundedWeight(weight_VD, compute_dtype(hidden_TD))
    with torch.autocast(hidden_TD.device.type, enabled=False):
        logprobs_T, entropy_T = TokenLogprobs.apply(  # type: ignore[no-untyped-call]
            hidden_TD, weight_VD, targets_T, options, rounded
        )
    return logprobs_T, entropy_T


class TokenLogprobs(torch.autograd.Function):
    """Implements `token_logprobs`; keeps hidden states, their log-sum-exps and at most one chunk.

    The factors of matrix products are in the precision of `rounded`. Logits, softmax, sums and the
    weight's gradient are in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        options: HeadOptions,
        rounded: RoundedWeight,
    ) -> tuple[Tensor, Tensor]:
        logprobs_T, entropy_T, normalizer_T = (
            hidden_TD.new_empty(len(hidden_TD), dtype=torch.float32) for _ in range(3)
        )
        factor_TD = hidden_TD.to(rounded.factor_VD.dtype)
        ctx.held_TV = None
        for chunk in split_into_chunks(len(hidden_TD), options.chunk_size):
            logits_TV = compute_logits(factor_TD[chunk], rounded, options)
            for block in split_into_blocks(logits_TV):
                rows = slice(chunk.start + block.start, chunk.start + block.stop)
                target_T1 = targets_T[rows, None]
                all_TV = torch.log_softmax(logits_TV[block], dim=-1)
                logprobs_T[rows] = all_TV.gather(1, target_T1)[:, 0]
                target_logit_T = logits_TV[block].gather(1, target_T1)[:, 0]
                normalizer_T[rows] = target_logit_T - logprobs_T[rows]
                entropy_T[rows] = -torch.einsum("tv,tv->t", all_TV.exp(), all_TV)
            if any(ctx.needs_input_grad) and len(hidden_TD) <= options.chunk_size:
                ctx.held_TV = logits_TV
            del logits_TV  # before the next chunk's are computed
        ctx.save_for_backward(factor_TD, weight_VD, targets_T, normalizer_T)
        ctx.options, ctx.dtype, ctx.rounded = options, hidden_TD.dtype, rounded
        ctx.mark_non_differentiable(entropy_T)
        return logprobs_T, entropy_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        factor_TD, weight_VD, targets_T, normalizer_T = ctx.saved_tensors
        factor_VD = ctx.rounded.factor_VD
        needed = ctx.needs_input_grad
        to_hidden_TD = factor_TD.new_empty(factor_TD.shape, dtype=ctx.dtype) if needed[0] else None
        # Adds in place to the gradient that the weight already has, if there is one.
        existing_VD = weight_VD.grad if needed[1] and weight_VD.is_leaf else None
        to_weight_VD = existing_VD
        if needed[1] and existing_VD is None:
            to_weight_VD = torch.zeros_like(weight_VD)
        for chunk in split_into_chunks(len(factor_TD), ctx.options.chunk_size):
            logits_TV, ctx.held_TV = ctx.held_TV, None
            if logits_TV is None:
                logits_TV = compute_logits(factor_TD[chunk], ctx.rounded, ctx.options)
            for block in split_into_blocks(logits_TV):
                rows = slice(chunk.start + block.start, chunk.start + block.stop)
                overwrite_with_gradient(
                    logits_TV[block], targets_T[rows], normalizer_T[rows], grad_T[rows], ctx.options
                )
            grad_TV = logits_TV.to(factor_VD.dtype)
            if to_hidden_TD is not None:
                to_hidden_TD[chunk] = multiply_gradient(grad_TV, factor_VD)
            if to_weight_VD is not None:
                add_to_gradient(to_weight_VD, grad_TV, factor_TD[chunk])
            del logits_TV, grad_TV  # before the next chunk's are computed
        return to_hidden_TD, to_weight_VD if existing_VD is None else None, None, None, None


def split_into_chunks(total: int, size: int) -> Iterator[slice]:
    """Yields the fewest slices of at most `size`, of equal length so that memory can be reused."""
    length = -(-total // -(-total // size)) if total else size
    for start in range(0, total, length):
        yield slice(start, min(start + length, total))


def split_into_blocks(logits_TV: Tensor) -> Iterator[slice]:
    """Yields slices of rows whose logits fit into a CPU's cache; all rows on a GPU."""
    rows, vocabulary = logits_TV.shape
    on_cpu = logits_TV.device.type == "cpu"
    return split_into_chunks(rows, max(1, CACHED_LOGITS // vocabulary) if on_cpu else rows)


def compute_logits(hidden_TD: Tensor, rounded: RoundedWeight, options: HeadOptions) -> Tensor:
    """Returns float32 logits [T, V], divided by the temperature."""
    logits_TV = rounded.multiply(hidden_TD)
    if options.scale != 1:
        logits_TV.mul_(options.scale)
    if options.cap is not None:
        logits_TV.div_(options.cap).tanh_().mul_(options.cap)
    return logits_TV if options.temperature == 1 else logits_TV.div_(options.temperature)


def overwrite_with_gradient(
    logits_TV: Tensor, targets_T: Tensor, normalizer_T: Tensor, grad_T: Tensor, options: HeadOptions
) -> None:
    """Overwrites logits with the gradient with respect to the product hidden · weightᵀ."""
    slope_TV = None
    if options.cap is not None:  # the derivative of cap · tanh(x / cap) is 1 - tanh²
        slope_TV = 1 - (logits_TV * (options.temperature / options.cap)).square_()
    logits_TV.sub_(normalizer_T[:, None]).exp_().mul_(-grad_T[:, None])
    logits_TV.scatter_add_(1, targets_T[:, None], grad_T[:, None])
    if slope_TV is not None:
        logits_TV.mul_(slope_TV)
    factor = options.scale / options.temperature
    if factor != 1:
        logits_TV.mul_(factor)
