"""The data of a page's browser: completions by step and prompt, answers before and after."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from grpo.report.html import Page, pack_text
from grpo.report.run.read import Run

CompletionLine = Mapping[str, Any]  # a line of completions.jsonl

ZERO_WIDTH = ord("#")  # the letter for a width of 0
KL_STEP, MAX_KL_STEPS = 0.05, 40  # nats; steps up or down, where the colours end
KL_LETTERS = {step: chr(ord("P") + step) for step in range(-MAX_KL_STEPS, MAX_KL_STEPS + 1)}
BLOCK_CHARACTERS = 1_000_000  # characters that the page unpacks at once
MAX_PAGE_CHARACTERS = 14_900_000  # characters of a page; completions get what the rest leaves
SAMPLED_BLOCKS = 8  # blocks that are packed to estimate the size of a large run

T = TypeVar("T")


def add_answers(page: Page, run: Run) -> dict[str, Any] | None:
    """Adds the answers before and after training to a page's data; returns them, None if none."""
    page.payload["answers"] = pair_answers(run.evaluations)
    return page.payload["answers"] or None


def add_completions(page: Page, run: Run, size: int) -> tuple[int, int]:
    """Adds as many completions to a page's data as fit.

    Args:
        size: characters of the page without them.

    Returns:
        The number of steps that have completions, and of those that the page shows.
    """
    steps = group_by_step(run.completions)
    blocks = pack_blocks(steps, MAX_PAGE_CHARACTERS - size)
    page.blocks = [block.packed for block in blocks]
    page.payload["completions"] = {
        "parts": list_reward_parts(run.completions),
        "blocks": [block.steps for block in blocks],
        "groups": sum(block.groups for block in blocks),
    }
    return len(steps), sum(len(block.steps) for block in blocks)


@dataclass(frozen=True)
class Block:
    """The packed completions of several successive steps."""

    steps: list[int]
    groups: int
    packed: str


def group_by_step(rows: Sequence[CompletionLine]) -> dict[int, list[CompletionLine]]:
    found: dict[int, list[CompletionLine]] = {}
    for row in rows:
        found.setdefault(row["step"], []).append(row)
    return found


def pack_blocks(steps: Mapping[int, Sequence[CompletionLine]], max_size: int) -> list[Block]:
    """Packs the completions of all steps, or of as many, evenly spread, as there is room for.

    Args:
        max_size: characters that all blocks together may have, packed.
    """
    share, whole = 1.0, group_into_blocks(list(steps), steps)
    if len(whole) > SAMPLED_BLOCKS:  # packing all of a large run only to find it too large is slow
        picked = pick_evenly(whole, SAMPLED_BLOCKS)
        sampled = sum(len(pack_block(block_steps, steps).packed) for block_steps in picked)
        share = min(1.0, max_size / (sampled * len(whole) / SAMPLED_BLOCKS))
    while True:
        wanted = pick_evenly(list(steps), round(share * len(steps)))
        blocks = [pack_block(part, steps) for part in group_into_blocks(wanted, steps)]
        size = sum(len(block.packed) for block in blocks)
        if size <= max_size or len(wanted) <= 2:
            return blocks
        share *= 0.97 * max_size / size


def pick_evenly(items: list[T], count: int) -> list[T]:
    """Picks `count` items, but at least two, evenly from the first to the last."""
    count = min(len(items), max(2, count))
    if count < 2:
        return items
    return [items[n * (len(items) - 1) // (count - 1)] for n in range(count)]


def group_into_blocks(
    wanted: Sequence[int], steps: Mapping[int, Sequence[CompletionLine]]
) -> list[list[int]]:
    """Groups steps into blocks, each of which the browser unpacks as a whole."""
    found: list[list[int]] = []
    size = BLOCK_CHARACTERS
    for step in wanted:
        if size >= BLOCK_CHARACTERS:
            found.append([])
            size = 0
        found[-1].append(step)
        size += sum(len(row["completion"]) + 8 * row["tokens"] for row in steps[step])
    return found


def pack_block(block_steps: Sequence[int], steps: Mapping[int, Sequence[CompletionLine]]) -> Block:
    rows = [row for step in block_steps for row in steps[step]]
    groups = len({(row["step"], row["prompt"]) for row in rows})
    return Block(
        list(block_steps),
        groups,
        pack_text(json.dumps(encode_completions(rows), ensure_ascii=False)),
    )


def list_reward_parts(rows: Sequence[CompletionLine]) -> list[str]:
    """Returns the keys of the rewards that were summed."""
    return [key for key in (rows[0] if rows else {}) if key.startswith("reward/")]


def encode_completions(rows: Sequence[CompletionLine]) -> dict[str, Any]:
    """Encodes rows as columns, which pack better, with each prompt once."""
    prompts = {prompt: n for n, prompt in enumerate(dict.fromkeys(row["prompt"] for row in rows))}
    parts = list_reward_parts(rows)
    return {
        "prompts": list(prompts),
        "facts": [
            [
                row["step"], prompts[row["prompt"]], row["answer"], row["reward"],
                row["advantage"], row["tokens"], row["truncated"], row["failed"],
                [row.get(part) for part in parts],
            ]
            for row in rows
        ],
        "texts": [row["completion"] for row in rows],
        "widths": [encode_widths(row.get("token_ends") or []) for row in rows],
        "kl": [encode_kl(row.get("token_kl") or []) for row in rows],
    }  # fmt: skip


def encode_widths(ends: Sequence[int]) -> str:
    """Encodes the number of characters of each token as a letter."""
    starts = [0, *ends]
    return "".join(
        [chr(ZERO_WIDTH + end - start) for start, end in zip(starts, ends, strict=False)]
    )


def encode_kl(kl: Sequence[float]) -> str:
    """Encodes the KL of each token as a letter, in steps as fine as the colours."""
    return "".join(
        [KL_LETTERS[max(-MAX_KL_STEPS, min(MAX_KL_STEPS, round(x / KL_STEP)))] for x in kl]
    )


def pair_answers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Pairs the first and last answer to each evaluation prompt; None without two evaluations."""
    steps = sorted({row["step"] for row in rows})
    if len(steps) < 2:
        return None
    first, last = ([row for row in rows if row["step"] == step] for step in (steps[0], steps[-1]))
    return {
        "first": steps[0],
        "last": steps[-1],
        "rows": [
            [a["prompt"], a["answer"], a["completion"], a["right"], b["completion"], b["right"]]
            for a, b in zip(first, last, strict=False)
        ],
    }
