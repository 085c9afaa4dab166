"""Converts examples to prompts: the chat that the model reads, as text and as tokens."""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, overload

from transformers import PreTrainedTokenizerBase

from grpo.data.rows import Examples
from grpo.errors import ConfigError
from grpo.models.chat_template import render_question
from grpo.types import Example, Prompt

log = logging.getLogger(__name__)

CACHED_PROMPTS = 4096  # prompts that are kept after they were made
LENGTH_SAMPLE = 256  # prompts whose lengths are checked before training


@dataclass(frozen=True)
class WorkedExample:
    question: str
    answer: str  # in the form that the model should write


@dataclass(frozen=True)
class PromptFormat:
    """How a question is turned into a prompt."""

    system_prompt: str | None
    worked_examples: tuple[WorkedExample, ...]
    chat: bool  # use the model's chat template
    template_options: Mapping[str, Any]  # variables for that template
    max_prompt_tokens: int

    def build_messages(self, example: Example) -> list[Mapping[str, str]]:
        """Builds the chat that ends with the question; the row's system prompt wins over ours."""
        row_messages = example.messages or ({"role": "user", "content": example.question},)
        messages: list[Mapping[str, str]] = []
        if self.system_prompt and row_messages[0]["role"] != "system":
            messages.append({"role": "system", "content": self.system_prompt})
        elif row_messages[0]["role"] == "system":
            messages.append(row_messages[0])
            row_messages = row_messages[1:]
        for worked in self.worked_examples:
            messages.append({"role": "user", "content": worked.question})
            messages.append({"role": "assistant", "content": worked.answer})
        return [*messages, *row_messages]

    def render(
        self, example: Example, tokenizer: PreTrainedTokenizerBase, key: str = "dataset"
    ) -> tuple[str, tuple[int, ...]]:
        """Returns a prompt's text and tokens, by the chat template if there is one.

        Args:
            key: the config key of the data set, for error messages.

        Raises:
            ConfigError: the template fails on the messages.
        """
        messages = self.build_messages(example)
        if not self.chat or tokenizer.chat_template is None:
            text = "\n\n".join(message["content"] for message in messages)
            text = text + "\n\n" if self.chat else text
            return text, encode_prompt(text, tokenizer, add_start_tokens=True)
        text = render_question(tokenizer, messages, self.template_options, key)
        return text, encode_prompt(text, tokenizer, add_start_tokens=False)


def encode_prompt(
    text: str, tokenizer: PreTrainedTokenizerBase, *, add_start_tokens: bool
) -> tuple[int, ...]:
    """Tokenizes a text that the model will continue: start tokens once, no end token.

    Args:
        add_start_tokens: prepend what the tokenizer puts before every text; a chat template
            writes it itself.
    """
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if add_start_tokens:
        start = find_start_tokens(ids, tokenizer.encode(text))
        overlaps = [n for n in range(len(start) + 1) if start[len(start) - n :] == ids[:n]]
        ids = [*start, *ids[max(overlaps) :]]
    ends_with_eos = text.endswith(tokenizer.eos_token or " ")
    while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not ends_with_eos:
        ids = ids[:-1]
    return tuple(ids)


def find_start_tokens(ids: Sequence[int], whole: Sequence[int]) -> list[int]:
    """Returns the special tokens in `whole` before `ids`, the tokens of the text alone."""
    if not ids:
        return list(whole)
    for start in range(len(whole) - len(ids) + 1):
        if whole[start : start + len(ids)] == ids:
            return list(whole[:start])
    return []


class LazyPromptSet(NamedTuple):
    """A set of training rows whose prompts are made when they are drawn."""

    examples: Sequence[Example]
    format: PromptFormat
    left_out: frozenset[str]  # the evaluation's questions
    name: str  # the set's name in a mix


class LazyPrompts(Sequence[Prompt]):
    """Prompts that are made when accessed, for data sets too large to make them all beforehand.

    A prompt's length is known only then. The caller asks `fits` and skips a prompt that doesn't;
    this class counts the skipped ones and logs a warning.
    """

    def __init__(self, sets: Sequence[LazyPromptSet], tokenizer: PreTrainedTokenizerBase) -> None:
        self.sets, self.tokenizer = sets, tokenizer
        self.ends = list(accumulate(len(prompt_set.examples) for prompt_set in sets))
        self.max_tokens = max(prompt_set.format.max_prompt_tokens for prompt_set in sets)
        self.unfit: set[int] = set()
        self.get_prompt = lru_cache(maxsize=CACHED_PROMPTS)(self._make)

    def __len__(self) -> int:
        return self.ends[-1]

    @overload
    def __getitem__(self, row: int) -> Prompt: ...
    @overload
    def __getitem__(self, row: slice) -> list[Prompt]: ...
    def __getitem__(self, row: int | slice) -> Prompt | list[Prompt]:
        if isinstance(row, slice):
            return [self.get_prompt(n) for n in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.get_prompt(row)

    def fits(self, row: int) -> bool:
        """Returns whether a prompt is short enough and not one of the evaluation's."""
        prompt_set = self.sets[bisect_right(self.ends, row)]
        if self.is_short(row) and self.get_prompt(row).example.question not in prompt_set.left_out:
            return True
        self.unfit.add(row)
        if len(self.unfit).bit_count() == 1:  # 1, 2, 4, 8 …
            log.warning(
                "%d training prompts so far are too long or evaluation rows; others are drawn in "
                "their place.", len(self.unfit),
            )  # fmt: skip
        return False

    def check_lengths(self, most_tokens: int) -> None:
        """Checks and logs the lengths of a sample of prompts, before any is drawn.

        Args:
            most_tokens: the longest prompt that the model has room for, in tokens.

        Raises:
            ConfigError: no prompt of the sample is short enough.
        """
        self.max_tokens = min(self.max_tokens, most_tokens)
        rows = range(0, len(self), -(-len(self) // LENGTH_SAMPLE))
        short = [row for row in rows if self.is_short(row)]
        if not short:
            shortest = min(len(self.get_prompt(row).token_ids) for row in rows)
            raise ConfigError(
                f"dataset.max_prompt_tokens={self.max_tokens}: the shortest of {len(rows)} "
                f"training prompts has {shortest} tokens, so none is left.",
                key="dataset.max_prompt_tokens",
                value=self.max_tokens,
            )
        log.info(
            "%d training rows: their prompts are made as they are drawn; of a sample of %d, %d are "
            "longer than %d tokens. Longer ones are left out, and others drawn in their place.",
            len(self), len(rows), len(rows) - len(short), self.max_tokens,
        )  # fmt: skip

    def is_short(self, row: int) -> bool:
        prompt_set = self.sets[bisect_right(self.ends, row)]
        limit = min(prompt_set.format.max_prompt_tokens, self.max_tokens)
        return len(self.get_prompt(row).token_ids) <= limit

    def list_fitting(self) -> list[Prompt]:
        return [self.get_prompt(row) for row in range(len(self)) if self.fits(row)]

    def list_sources(self) -> list[str]:
        return [name for each in self.sets for name in [each.name] * len(each.examples)]

    def find_questions(self, questions: set[str]) -> set[str]:
        """Returns those of the questions that are trained on."""
        found: set[str] = set()
        for prompt_set in self.sets:
            rest = questions - prompt_set.left_out
            if rest:
                found.update(e.question for e in prompt_set.examples if e.question in rest)
        return found

    def _make(self, row: int) -> Prompt:
        at = bisect_right(self.ends, row)
        prompt_set, before = self.sets[at], self.ends[at - 1] if at else 0
        example = prompt_set.examples[row - before]
        return Prompt(*prompt_set.format.render(example, self.tokenizer), example)


@dataclass(frozen=True)
class PromptSets:
    train: list[Prompt] | LazyPrompts
    evaluation: list[Prompt]

    def compute_fingerprint(self) -> str:
        """Returns a sha256 of all tokens; of lazy prompts, of their number."""
        known = [] if isinstance(self.train, LazyPrompts) else self.train
        total = hashlib.sha256(str(len(self.train)).encode())
        for prompt in (*known, *self.evaluation):
            total.update(repr(prompt.token_ids).encode())
        return total.hexdigest()


def drop_held_out(
    train: Sequence[Example], evaluation: Sequence[Example], key: str
) -> Sequence[Example]:
    """Returns the training rows that are not evaluation rows; warns of the number dropped.

    Raises:
        ConfigError: no training row is left.
    """
    held_out = {example.question for example in evaluation}
    kept: Sequence[Example]
    if isinstance(train, Examples):
        kept = train.drop_questions(held_out)
    else:
        kept = [example for example in train if example.question not in held_out]
    if not kept:
        raise ConfigError(
            f"{key}: every training row is an evaluation row too; choose another {key}.slice or "
            f"{key}.eval_slice, or {key}.allow_overlap=true."
        )
    if len(kept) < len(train):
        log.warning(
            "%d training rows are evaluation rows too and are not trained on "
            "(%s.allow_overlap=true keeps them).",
            len(train) - len(kept),
            key,
        )
    return kept


def tokenize_examples(
    examples: Sequence[Example],
    format: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    role: str,
    key: str,
) -> list[Prompt]:
    """Converts examples to prompts; drops those that are too long and warns of their number.

    Args:
        role, key: what the examples are for and their config key, for messages.

    Raises:
        ConfigError: no prompt is short enough.
    """
    prompts = [Prompt(*format.render(e, tokenizer, key), e) for e in examples]
    kept = [p for p in prompts if len(p.token_ids) <= format.max_prompt_tokens]
    if len(kept) < len(prompts):
        log.warning(
            "%d of %d %s prompts are longer than %s.max_prompt_tokens=%d and are dropped.",
            len(prompts) - len(kept),
            len(prompts),
            role,
            key,
            format.max_prompt_tokens,
        )
    if not kept:
        shortest = min(len(p.token_ids) for p in prompts)
        raise ConfigError(
            f"{key}.max_prompt_tokens={format.max_prompt_tokens}: the shortest {role} prompt has "
            f"{shortest} tokens, so none is left.",
            key=f"{key}.max_prompt_tokens",
            value=format.max_prompt_tokens,
        )
    return kept
