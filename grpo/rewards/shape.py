"""Rewards for the form of a completion: its tags, steps, length and repetitions."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Hashable, Sequence

from grpo.errors import ConfigError
from grpo.rewards.option_checks import require_at_least
from grpo.types import Failure, Sample

# A numbered step, a numbered line or a bullet, a word such as "First,".
STEP_MARKER = re.compile(
    r"\bstep \d+|^[ \t]*(?:\d+[.)]|[-*•])[ \t]+|\b(?:first|second|third|next|finally)(?:ly)?,",
    re.IGNORECASE | re.MULTILINE,
)


class TagCount:
    """The share of the tags that occur exactly once in a completion: 0.25 for each of four.

    Like open-r1's `tag_count_reward`, but without line breaks around the tags.

    Args:
        tags: the exact text of each tag.
    """

    def __init__(
        self, tags: Sequence[str] = ("<think>", "</think>", "<answer>", "</answer>")
    ) -> None:
        if not tags or isinstance(tags, str) or not all(isinstance(t, str) and t for t in tags):
            raise ConfigError(
                f"tags={tags!r}: should be a list of tags, such as [<b>, </b>].",
                key="tags",
                value=tags,
            )
        self.tags = tags

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [
            sum(sample.completion.count(tag) == 1 for tag in self.tags) / len(self.tags)
            for sample in samples
        ]


class ReasoningSteps:
    """The number of step markers in a completion, divided by `target`; at most 1.

    A marker is "Step 1", a numbered line, a bullet, or "First," "Second," "Third," "Next,"
    "Finally,". Follows open-r1's `reasoning_steps_reward`.

    Args:
        target: the number of markers that gives 1.
    """

    def __init__(self, target: int = 3) -> None:
        require_at_least(1, target=target)
        self.target = target

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [min(1.0, len(STEP_MARKER.findall(s.completion)) / self.target) for s in samples]


class Length:
    """From 0.5 for the shortest completion of its group to -0.5 for the longest, in tokens.

    A wrong completion gets 0 at most. If all of a group have the same length, all get 0.
    Kimi k1.5 (2501.12599), section 2.3.3. A completion is right if the data set's verifier gives 1.
    """

    def __call__(self, samples: Sequence[Sample]) -> list[float | Failure]:
        lengths = defaultdict(list)
        for sample in samples:
            lengths[sample.group].append(len(sample.token_ids))
        return [self.reward(sample, lengths[sample.group]) for sample in samples]

    def reward(self, sample: Sample, lengths: Sequence[int]) -> float | Failure:
        shortest, longest = min(lengths), max(lengths)
        if shortest == longest:
            return 0.0
        gain = 0.5 - (len(sample.token_ids) - shortest) / (longest - shortest)
        verdict = sample.verdict
        if isinstance(verdict, Failure):
            return verdict
        return gain if verdict >= 1 else min(0.0, gain)


class Cosine:
    """From a start value at 0 tokens to an end value at `max_tokens`, along half a cosine.

    By default, longer right completions get less reward and longer wrong ones less penalty, so that
    the model thinks longer where it can't answer yet. Beyond `max_tokens`, the end value holds.
    2502.03373, appendix C.1, with its defaults.

    Args:
        max_tokens: tokens of a completion at which the end value is reached.
        right_start, right_end: for a completion that the data set's verifier gives 1.
        wrong_start, wrong_end: for any other completion.
        cut_off: for a truncated completion, so that endless ones don't pay.
    """

    def __init__(
        self,
        max_tokens: int,
        right_start: float = 2.0,
        right_end: float = 1.0,
        wrong_start: float = -10.0,
        wrong_end: float = 0.0,
        cut_off: float = -10.0,
    ) -> None:
        require_at_least(1, max_tokens=max_tokens)
        self.max_tokens = max_tokens
        self.right = (right_start, right_end)
        self.wrong = (wrong_start, wrong_end)
        self.cut_off = cut_off

    def __call__(self, samples: Sequence[Sample]) -> list[float | Failure]:
        return [self.reward(sample) for sample in samples]

    def reward(self, sample: Sample) -> float | Failure:
        if sample.truncated:
            return self.cut_off
        verdict = sample.verdict
        if isinstance(verdict, Failure):
            return verdict
        start, end = self.right if verdict >= 1 else self.wrong
        progress = min(1.0, len(sample.token_ids) / self.max_tokens)
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


class Repetition:
    """`max_penalty` times the share of repeated n-grams; 0 if all n-grams are distinct.

    The n-gram penalty of 2502.03373, over a whole completion as in open-r1.

    Args:
        ngram: words or tokens per n-gram; a shorter completion gets 0.
        max_penalty: 0 or less; a completion that only repeats comes close to it.
        over: words (split at white space, case ignored) or tokens.
    """

    def __init__(self, ngram: int = 3, max_penalty: float = -1.0, over: str = "words") -> None:
        require_at_least(1, ngram=ngram)
        if max_penalty > 0:
            raise ConfigError(
                f"max_penalty={max_penalty}: is a penalty, so use 0 or less.",
                key="max_penalty",
                value=max_penalty,
            )
        if over not in ("words", "tokens"):
            raise ConfigError(f"over={over!r}: use words or tokens.", key="over", value=over)
        self.ngram = ngram
        self.max_penalty = max_penalty
        self.over = over

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [self.max_penalty * self.repeated_share(sample) for sample in samples]

    def repeated_share(self, sample: Sample) -> float:
        units: Sequence[Hashable] = (
            sample.completion.lower().split() if self.over == "words" else sample.token_ids
        )
        ngrams = list(zip(*(units[start:] for start in range(self.ngram)), strict=False))
        return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


class SoftOverlong:
    """0 up to `max_tokens` - `buffer` tokens, then linear down to -1 at `max_tokens` and beyond.

    DAPO (2503.14476), eq. 13.

    Args:
        max_tokens: length with -1; equal to `max_new_tokens`, it penalizes before truncation.
        buffer: tokens over which the reward falls.
    """

    def __init__(self, max_tokens: int, buffer: int) -> None:
        if not 1 <= buffer <= max_tokens:
            raise ConfigError(
                f"buffer={buffer}: should be from 1 to max_tokens={max_tokens}.",
                key="buffer",
                value=buffer,
            )
        self.max_tokens = max_tokens
        self.buffer = buffer

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [self.reward(len(sample.token_ids)) for sample in samples]

    def reward(self, tokens: int) -> float:
        return min(0.0, max(-1.0, (self.max_tokens - self.buffer - tokens) / self.buffer))
