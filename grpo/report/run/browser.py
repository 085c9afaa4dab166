"""What the page's completions browser reads: the samples by step and prompt, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grpo.report.run.read import Run
from grpo.report.shell import Page

KL_UNIT = 100  # parts of a nat


def browser(page: Page, run: Run) -> str:
    """Its place in the page; the texts go into the page's data."""
    page.payload["completions"] = samples(run.completions)
    page.payload["answers"] = before_and_after(run.evaluations)
    parts = []
    if run.completions:
        parts.append(
            "<section id=completions><h2>Completions</h2><p>What the policy wrote in training, a "
            "group beside each other: the same prompt, and how much better than its group each "
            "one did.</p></section>"
        )
    if page.payload["answers"]:
        first, last = (page.payload["answers"][key] for key in ("first", "last"))
        parts.append(
            f"<section id=answers><h2>Before and after</h2><p>The evaluation's prompts, answered "
            f"greedily at step {first} and at step {last}.</p></section>"
        )
    return "".join(parts)


def samples(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Columns, with each prompt once."""
    prompts = {prompt: n for n, prompt in enumerate(dict.fromkeys(row["prompt"] for row in rows))}
    parts = [key for key in (rows[0] if rows else {}) if key.startswith("reward/")]
    return {
        "prompts": list(prompts),
        "parts": parts,
        "rows": [
            [
                row["step"], prompts[row["prompt"]], row["answer"], row["completion"],
                row["reward"], row["advantage"], row["tokens"], row["truncated"], row["failed"],
                [row.get(part) for part in parts], widths(row.get("token_ends") or []),
                [round(x * KL_UNIT) for x in row.get("token_kl") or []],
            ]
            for row in rows
        ],
    }  # fmt: skip


def widths(ends: Sequence[int]) -> list[int]:
    """Characters of each token."""
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def before_and_after(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The first and the last answer to each evaluation prompt; None where there are no two."""
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
