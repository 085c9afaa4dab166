"""Measures how hard each training prompt is for the model before training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo.errors import ConfigError
from grpo.parallel import ONE_RANK, Ranks
from grpo.rewards.scoring import find_right, to_samples
from grpo.rollout import Engine
from grpo.runs.jsonl import encode_line, read_lines, reopen
from grpo.types import Prompt, Sampling

log = logging.getLogger(__name__)

DIFFICULTY_FILE = "difficulty.jsonl"
DIFFICULTY_SEED = 1  # seeds the completions: each measurement samples the same ones
PROMPTS_AT_ONCE = 64  # so that a long measurement logs its progress


@dataclass(frozen=True)
class Curriculum:
    """Which training prompts a run uses, and in which order."""

    order: str  # shuffled, given, easy_first or hard_first
    samples: int  # completions a prompt to measure its difficulty; 0: not measured
    at_least: float  # smallest share of right completions
    at_most: float  # largest share

    def choose(self, prompts: Sequence[Prompt], solved_shares: Sequence[float]) -> list[Prompt]:
        """Returns the prompts whose solved share is within the bounds, in order.

        Raises:
            ConfigError: no prompt is within the bounds.
        """
        kept = [
            n for n, share in enumerate(solved_shares) if self.at_least <= share <= self.at_most
        ]
        if not kept:
            raise ConfigError(
                f"curriculum.at_least={self.at_least} at_most={self.at_most}: no training prompt "
                f"is solved that often; the solved shares go from {min(solved_shares):g} to "
                f"{max(solved_shares):g}, so widen the bounds."
            )
        log.info(
            "difficulty: of %d training prompts, %d are always solved and %d never; %d are used",
            len(prompts), sum(share == 1 for share in solved_shares),
            sum(share == 0 for share in solved_shares), len(kept),
        )  # fmt: skip
        if self.order in ("easy_first", "hard_first"):
            kept.sort(key=lambda n: solved_shares[n], reverse=self.order == "easy_first")
        return [prompts[n] for n in kept]


def measure_difficulty(
    run: Path,
    prompts: Sequence[Prompt],
    engine: Engine,
    sampling: Sampling,
    samples: int,
    ranks: Ranks = ONE_RANK,
) -> list[float]:
    """Returns the share of right completions of each prompt.

    Appends each share to DIFFICULTY_FILE at once, and reads the shares that are there already, so
    that no measurement is lost to a crash or a refused config.
    """
    file = run / DIFFICULTY_FILE
    solved = list(ranks.compute_on_first(lambda: read_measured(file, prompts, samples)))
    for start in range(len(solved), len(prompts), PROMPTS_AT_ONCE):
        part, seed = prompts[start : start + PROMPTS_AT_ONCE], DIFFICULTY_SEED + start
        shares = measure_solved_shares(part, engine, sampling, samples, seed, ranks)
        if ranks.is_first:
            lines = [
                encode_line({"prompt": prompt.text, "solved": share, "samples": samples})
                for prompt, share in zip(part, shares, strict=True)
            ]
            with file.open("a", encoding="utf-8") as out:
                out.write("".join(lines))
        solved += shares
        log.info("difficulty: %d of %d prompts measured", len(solved), len(prompts))
    return solved


def read_measured(file: Path, prompts: Sequence[Prompt], samples: int) -> list[float]:
    """Returns the shares that an earlier start of this run has measured, and readies the file."""
    measured = read_lines(file)
    found = [(row["prompt"], row["samples"]) for row in measured]
    if found != [(prompt.text, samples) for prompt in prompts[: len(measured)]]:
        log.warning("%s is of other prompts or another curriculum.samples; measuring anew.", file)
        file.unlink()
        measured = []
    reopen(file).close()
    return [float(row["solved"]) for row in measured]


def measure_solved_shares(
    prompts: Sequence[Prompt],
    engine: Engine,
    sampling: Sampling,
    samples: int,
    seed: int,
    ranks: Ranks,
) -> list[float]:
    """Returns the share of right completions of each prompt, of which each rank measures some."""
    shares = ranks.divide([len(prompt.token_ids) for prompt in prompts])

    def measure() -> list[float]:
        share = shares[ranks.index]
        if not share:
            return []
        only = {} if ranks.size == 1 else {"share": share}
        right = find_right(to_samples(engine.generate(prompts, samples, sampling, seed, **only)))
        return [sum(right[n * samples : (n + 1) * samples]) / samples for n in range(len(share))]

    solved: dict[int, float] = {}
    for share, measured in zip(shares, ranks.gather(measure), strict=True):
        solved |= dict(zip(share, measured, strict=True))
    return [solved[b] for b in range(len(prompts))]
