"""Log-probabilities of given tokens straight from hidden states, for the usual softmax head.

The same numbers as `head.score_tokens` on whole logits, with a backward pass written out: logits
are overwritten by their own gradient. Where they are one chunk, it is held from the forward pass to
the backward; where they are more, each is made again. What the gradient of log softmax(z)_t is, one
knows: onehot(t) - softmax(z).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo.models.cpu.linear import add_to_gradient, compute_dtype, linear_in_fp32

CACHED_LOGITS = 2**21  # 8 MB in fp32: what a CPU goes over again and again while it is in its cache


@dataclass(frozen=True)
class HeadOptions:
    """What a head does to a product, in this order, and how many rows of it are held at once."""

    scale: float
    cap: float | None  # cap · tanh(· / cap)
    temperature: float
    chunk_size: int


def token_logprobs(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, options: HeadOptions
) -> tuple[Tensor, Tensor]:
    """[T] float32 log-probabilities of the targets, and [T] entropies, which have no gradient."""
    factors = compute_dtype(hidden_TD)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        logprobs_T, entropy_T = TokenLogprobs.apply(  # type: ignore[no-untyped-call]
            hidden_TD, weight_VD, targets_T, options, factors
        )
    return logprobs_T, entropy_T


class TokenLogprobs(torch.autograd.Function):
    """As `token_logprobs` says; keeps the hidden states, a log-sum-exp for each, and one chunk.

    The products' factors are in the precision given. Logits, softmax and sums are in fp32, and so
    is the weight's gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        options: HeadOptions,
        factor_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        logprobs_T, entropy_T, normalizer_T = (
            hidden_TD.new_empty(len(hidden_TD), dtype=torch.float32) for _ in range(3)
        )
        factor_TD, factor_VD = hidden_TD.to(factor_dtype), weight_VD.to(factor_dtype)
        ctx.held_TV = None
        for chunk in split_into_chunks(len(hidden_TD), options.chunk_size):
            logits_TV = compute_logits(factor_TD[chunk], factor_VD, options)
            for block in split_into_blocks(logits_TV):
                own = slice(chunk.start + block.start, chunk.start + block.stop)
                target_T1 = targets_T[own, None]
                all_TV = torch.log_softmax(logits_TV[block], dim=-1)
                logprobs_T[own] = all_TV.gather(1, target_T1)[:, 0]
                target_logit_T = logits_TV[block].gather(1, target_T1)[:, 0]
                normalizer_T[own] = target_logit_T - logprobs_T[own]
                entropy_T[own] = -torch.einsum("tv,tv->t", all_TV.exp(), all_TV)
            if any(ctx.needs_input_grad) and len(hidden_TD) <= options.chunk_size:
                ctx.held_TV = logits_TV
            del logits_TV  # before the next chunk's are made
        ctx.save_for_backward(factor_TD, factor_VD, weight_VD, targets_T, normalizer_T)
        ctx.options, ctx.dtype = options, hidden_TD.dtype
        ctx.mark_non_differentiable(entropy_T)
        return logprobs_T, entropy_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        factor_TD, factor_VD, weight_VD, targets_T, normalizer_T = ctx.saved_tensors
        needed = ctx.needs_input_grad
        to_hidden_TD = factor_TD.new_empty(factor_TD.shape, dtype=ctx.dtype) if needed[0] else None
        # Added up in what the weight has of its gradient already, if it has any.
        there_VD = weight_VD.grad if needed[1] and weight_VD.is_leaf else None
        to_weight_VD = there_VD
        if needed[1] and there_VD is None:
            to_weight_VD = torch.zeros_like(weight_VD)
        for chunk in split_into_chunks(len(factor_TD), ctx.options.chunk_size):
            logits_TV, ctx.held_TV = ctx.held_TV, None
            if logits_TV is None:
                logits_TV = compute_logits(factor_TD[chunk], factor_VD, ctx.options)
            for block in split_into_blocks(logits_TV):
                own = slice(chunk.start + block.start, chunk.start + block.stop)
                overwrite_with_gradient(
                    logits_TV[block], targets_T[own], normalizer_T[own], grad_T[own], ctx.options
                )
            grad_TV = logits_TV.to(factor_VD.dtype)
            if to_hidden_TD is not None:
                to_hidden_TD[chunk] = linear_in_fp32(grad_TV, factor_VD.t())
            if to_weight_VD is not None:
                add_to_gradient(to_weight_VD, grad_TV, factor_TD[chunk])
            del logits_TV, grad_TV  # before the next chunk's are made
        return to_hidden_TD, to_weight_VD if there_VD is None else None, None, None, None


def split_into_chunks(total: int, size: int) -> Iterator[slice]:
    """As few as are no longer than `size`, alike, so that one's memory is right for the next."""
    length = -(-total // -(-total // size)) if total else size
    for start in range(0, total, length):
        yield slice(start, min(start + length, total))


def split_into_blocks(logits_TV: Tensor) -> Iterator[slice]:
    """Rows to go over together."""
    rows, vocabulary = logits_TV.shape
    on_cpu = logits_TV.device.type == "cpu"
    return split_into_chunks(rows, max(1, CACHED_LOGITS // vocabulary) if on_cpu else rows)


def compute_logits(hidden_TD: Tensor, weight_VD: Tensor, options: HeadOptions) -> Tensor:
    """[T, V] float32, over the temperature."""
    logits_TV = linear_in_fp32(hidden_TD, weight_VD)
    if options.scale != 1:
        logits_TV.mul_(options.scale)
    if options.cap is not None:
        logits_TV.div_(options.cap).tanh_().mul_(options.cap)
    return logits_TV if options.temperature == 1 else logits_TV.div_(options.temperature)


def overwrite_with_gradient(
    logits_TV: Tensor, targets_T: Tensor, normalizer_T: Tensor, grad_T: Tensor, options: HeadOptions
) -> None:
    """Puts the gradient by the product in the place of the logits that were made of it."""
    slope_TV = None
    if options.cap is not None:  # of cap · tanh(x / cap): 1 - tanh²
        slope_TV = 1 - (logits_TV * (options.temperature / options.cap)).square_()
    logits_TV.sub_(normalizer_T[:, None]).exp_().mul_(-grad_T[:, None])
    logits_TV.scatter_add_(1, targets_T[:, None], grad_T[:, None])
    if slope_TV is not None:
        logits_TV.mul_(slope_TV)
    factor = options.scale / options.temperature
    if factor != 1:
        logits_TV.mul_(factor)
