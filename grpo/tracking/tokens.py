"""A completion's tokens in its text, for pages that colour them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from grpo.models.end_tokens import Decoder
from grpo.tracking.tracker import CompletionRow
from grpo.types import Rollout

REPLACEMENT_CHARACTER = "\ufffd"  # what a part of a character decodes to


def add_token_fields(
    rows: Sequence[CompletionRow],
    rollout: Rollout,
    log_ratio_NC: Tensor | None,
    decoder: Decoder,
) -> list[CompletionRow]:
    """The rows of a rollout's first completions, with what there is to say of each token.

    Its KL is the policy's log-probability less the reference's, in nats, both of the distribution
    that nothing is cut from; their mean is k1. It is left out where there is no reference.
    """
    own = slice(len(rows))
    kl: list[list[float]] = [[] for _ in rows]
    if log_ratio_NC is not None:
        kl = log_ratio_NC[own].tolist()
    return [
        replace(
            row,
            token_ends=find_token_ends(decoder, ids[: row.tokens], row.completion),
            token_kl=[round(x, 3) for x in logs[: row.tokens]],
        )
        for row, ids, logs in zip(rows, rollout.tokens_NC[own].tolist(), kl, strict=True)
    ]


def find_token_ends(decoder: Decoder, ids: Sequence[int], text: str) -> list[int]:
    """Where in a text each of the tokens that it was decoded from ends.

    What the text doesn't show takes no place. Nothing where the tokens don't spell the text: a
    stop string was cut off.
    """
    pieces = decoder.decode_batch([[one] for one in ids])
    if "".join(pieces) != text:  # characters of several tokens, or spaces that depend on neighbours
        pieces = decode_one_by_one(decoder, ids)
    ends, end = [], 0
    for piece in pieces:
        end += len(piece)
        ends.append(end)
    return ends if end == len(text) else []


def decode_one_by_one(decoder: Decoder, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of those before it; the last of a character has it all."""
    pieces, start, done = [], 0, 0
    for n in range(1, len(ids) + 1):
        before, after = decoder.decode_batch([ids[start:end] for end in (done, n)])
        if after.endswith(REPLACEMENT_CHARACTER) and n < len(ids):
            pieces.append("")
            continue
        pieces.append(after[len(before) :])
        start, done = done, n
    return pieces
