"""Finds a completion's tokens in its text, for pages that colour them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from grpo.models.end_tokens import Decoder
from grpo.tracking.tracker import CompletionRow
from grpo.types import Rollout

REPLACEMENT_CHARACTER = "\ufffd"  # what an incomplete character decodes to


def add_token_fields(
    rows: Sequence[CompletionRow],
    rollout: Rollout,
    log_ratio_NC: Tensor | None,
    decoder: Decoder,
) -> list[CompletionRow]:
    """Adds each token's end and KL to the rows of a rollout's first completions.

    A token's KL is the policy's log-probability minus the reference's, in nats, both of the
    distribution from which no token is cut; their mean is k1. Without a reference it is left out.

    Args:
        log_ratio_NC: these differences; None without a reference.
    """
    first = slice(len(rows))
    kl: list[list[float]] = [[] for _ in rows]
    if log_ratio_NC is not None:
        kl = log_ratio_NC[first].tolist()
    return [
        replace(
            row,
            token_ends=find_token_ends(decoder, ids[: row.tokens], row.completion),
            token_kl=[round(x, 3) for x in logs[: row.tokens]],
        )
        for row, ids, logs in zip(rows, rollout.tokens_NC[first].tolist(), kl, strict=True)
    ]


def find_token_ends(decoder: Decoder, ids: Sequence[int], text: str) -> list[int]:
    """Returns where in a text each of its tokens ends, in characters.

    A token that the text doesn't show has width 0. Returns [] if the tokens don't spell the text,
    because a stop string was cut off.
    """
    pieces = decoder.decode_batch([[id] for id in ids])
    if "".join(pieces) != text:  # characters of several tokens, or spaces that depend on neighbours
        pieces = decode_one_by_one(decoder, ids)
    ends, end = [], 0
    for piece in pieces:
        end += len(piece)
        ends.append(end)
    return ends if end == len(text) else []


def decode_one_by_one(decoder: Decoder, ids: Sequence[int]) -> list[str]:
    """Returns what each token adds to the text before it; a character goes to its last token."""
    pieces, start, done = [], 0, 0
    for n in range(1, len(ids) + 1):
        before, after = decoder.decode_batch([ids[start:end] for end in (done, n)])
        if after.endswith(REPLACEMENT_CHARACTER) and n < len(ids):
            pieces.append("")
            continue
        pieces.append(after[len(before) :])
        start, done = done, n
    return pieces
