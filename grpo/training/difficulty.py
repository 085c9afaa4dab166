"""How hard each training prompt is for the model that training begins with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo.errors import ConfigError
from grpo.rewards.scoring import find_right, to_samples
from grpo.rollout import Engine
from grpo.runs.jsonl import encode_line, read_lines, reopen
from grpo.types import Prompt, Sampling

log = logging.getLogger(__name__)

DIFFICULTY_FILE = "difficulty.jsonl"
DIFFICULTY_SEED = 1  # of the completions: the same however often they are made
PROMPTS_AT_ONCE = 64  # prompts, so that a long measurement says how far it is


@dataclass(frozen=True)
class Curriculum:
    """Which training prompts are used, and in which order."""

    order: str  # shuffled, given, easy_first or hard_first
    samples: int  # completions a prompt to find how hard it is; 0: it isn't asked
    at_least: float  # share of them that is right
    at_most: float

    def choose(self, prompts: Sequence[Prompt], solved_shares: Sequence[float]) -> list[Prompt]:
        """The prompts within the bounds, in order.

        Raises:
            ConfigError: there are none.
        """
        kept = [
            n for n, share in enumerate(solved_shares) if self.at_least <= share <= self.at_most
        ]
        if not kept:
            raise ConfigError(
                f"curriculum.at_least={self.at_least} at_most={self.at_most}: no training prompt "
                f"is solved that often; the shares go from {min(solved_shares):g} to "
                f"{max(solved_shares):g}."
            )
        log.info(
            "difficulty: of %d training prompts %d are solved always and %d never; %d are used",
            len(prompts), sum(share == 1 for share in solved_shares),
            sum(share == 0 for share in solved_shares), len(kept),
        )  # fmt: skip
        if self.order in ("easy_first", "hard_first"):
            kept.sort(key=lambda n: solved_shares[n], reverse=self.order == "easy_first")
        return [prompts[n] for n in kept]


def measure_difficulty(
    run: Path, prompts: Sequence[Prompt], engine: Engine, sampling: Sampling, samples: int
) -> list[float]:
    """The share of each prompt's completions that are right.

    Written down as it is measured, and read where that was done before, so that no measurement is
    lost to a crash or a refusal.
    """
    file = run / DIFFICULTY_FILE
    texts = [prompt.text for prompt in prompts]
    before = read_lines(file)
    same = [(row["prompt"], row["samples"]) for row in before]
    if same != [(text, samples) for text in texts[: len(before)]]:
        log.warning("%s is of other prompts or samples; measured anew.", file)
        file.unlink()
        before = []
    solved = [float(row["solved"]) for row in before]
    with reopen(file) as out:
        for start in range(len(solved), len(prompts), PROMPTS_AT_ONCE):
            part = prompts[start : start + PROMPTS_AT_ONCE]
            shares = measure_solved_shares(part, engine, sampling, samples, DIFFICULTY_SEED + start)
            for prompt, share in zip(part, shares, strict=True):
                out.write(encode_line({"prompt": prompt.text, "solved": share, "samples": samples}))
            out.flush()
            solved += shares
            log.info("difficulty: %d of %d prompts measured", len(solved), len(prompts))
    return solved


def measure_solved_shares(
    prompts: Sequence[Prompt], engine: Engine, sampling: Sampling, samples: int, seed: int
) -> list[float]:
    rollout = engine.generate(prompts, samples, sampling, seed)
    right = find_right(to_samples(rollout))
    return [sum(right[b * samples : (b + 1) * samples]) / samples for b in range(len(prompts))]
