"""A reward of one's own: nearer is better."""

from __future__ import annotations

import re
from collections.abc import Sequence

from grpo.types import Sample

ANSWER = re.compile(r"<answer>\s*(-?\d+)\s*</answer>")


class Near:
    """1 for the right number, less the further off it is, 0 for none.

    Args:
        scale: a number that is this far off has half the reward.
    """

    def __init__(self, scale: float = 5.0) -> None:
        self.scale = scale

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [self.score(sample) for sample in samples]

    def score(self, sample: Sample) -> float:
        found = ANSWER.findall(sample.completion)
        if not found:
            return 0.0
        return self.scale / (self.scale + abs(int(found[-1]) - int(sample.answer)))
