"""Examples to prompts: the chat the model reads, as text and as tokens."""

from __future__ import annotations

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

CACHED_PROMPTS = 4096  # prompts
LENGTH_SAMPLE = 256


@dataclass(frozen=True)
class WorkedExample:
    question: str
    answer: str  # as the model is to write it


@dataclass(frozen=True)
class PromptFormat:
    """How a question is put to the model."""

    system_prompt: str | None
    worked_examples: tuple[WorkedExample, ...]
    chat: bool  # by the model's chat template
    template_options: Mapping[str, Any]  # for that template
    max_prompt_tokens: int

    def build_messages(self, example: Example) -> list[Mapping[str, str]]:
        """The chat that ends with the question; a system prompt of the row's own goes first."""
        asked = example.messages or ({"role": "user", "content": example.question},)
        messages: list[Mapping[str, str]] = []
        if self.system_prompt and asked[0]["role"] != "system":
            messages.append({"role": "system", "content": self.system_prompt})
        elif asked[0]["role"] == "system":
            messages.append(asked[0])
            asked = asked[1:]
        for worked in self.worked_examples:
            messages.append({"role": "user", "content": worked.question})
            messages.append({"role": "assistant", "content": worked.answer})
        return [*messages, *asked]

    def render(
        self, example: Example, tokenizer: PreTrainedTokenizerBase, key: str = "dataset"
    ) -> tuple[str, tuple[int, ...]]:
        """A prompt's text and tokens: by the chat template, or as plain text.

        Args:
            key: where the data set's config is, for the messages.

        Raises:
            ConfigError: the template refuses it.
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
    """The tokens of a text that is to be continued: begun once, and not ended.

    Args:
        begins: what the tokenizer puts before every text goes before this one; a chat template
            writes it itself.
    """
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if add_start_tokens:
        before = find_start_tokens(ids, tokenizer.encode(text))
        written = [n for n in range(len(before) + 1) if before[len(before) - n :] == ids[:n]]
        ids = [*before, *ids[max(written) :]]
    ends_with_it = text.endswith(tokenizer.eos_token or " ")
    while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not ends_with_it:
        ids = ids[:-1]
    return tuple(ids)


def find_start_tokens(ids: Sequence[int], whole: Sequence[int]) -> list[int]:
    """The special tokens that stand before a text's own."""
    if not ids:
        return list(whole)
    for start in range(len(whole) - len(ids) + 1):
        if whole[start : start + len(ids)] == ids:
            return list(whole[:start])
    return []


class LazyPromptSet(NamedTuple):
    """A set of training rows whose prompts are made as they are drawn."""

    examples: Sequence[Example]
    format: PromptFormat
    left_out: frozenset[str]  # questions that are the evaluation's
    name: str  # of the set in a mix


class LazyPrompts(Sequence[Prompt]):
    """Prompts made when they are asked for, where there are too many to make them all beforehand.

    So it comes out only then that one is too long. `fits` says it of each; those that don't are
    left out by whoever draws, and counted here, out loud.
    """

    def __init__(self, sets: Sequence[LazyPromptSet], tokenizer: PreTrainedTokenizerBase) -> None:
        self.sets, self.tokenizer = sets, tokenizer
        self.ends = list(accumulate(len(own.examples) for own in sets))
        self.max_tokens = max(own.format.max_prompt_tokens for own in sets)
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
        """Whether a prompt is short enough, and not one of the evaluation's."""
        own = self.sets[bisect_right(self.ends, row)]
        if self.is_short(row) and self.get_prompt(row).example.question not in own.left_out:
            return True
        self.unfit.add(row)
        if len(self.unfit).bit_count() == 1:  # 1, 2, 4, 8 …
            log.warning(
                "%d training prompts so far are too long or evaluation rows; others are drawn in "
                "their place.", len(self.unfit),
            )  # fmt: skip
        return False

    def check_lengths(self, most_tokens: int) -> None:
        """Says what is known of their lengths before any is drawn, from a sample.

        Args:
            most_tokens: what the model has room for.

        Raises:
            ConfigError: none of the sample fits.
        """
        self.max_tokens = min(self.max_tokens, most_tokens)
        rows = range(0, len(self), -(-len(self) // LENGTH_SAMPLE))
        short = [row for row in rows if self.is_short(row)]
        if not short:
            shortest = min(len(self.get_prompt(row).token_ids) for row in rows)
            raise ConfigError(
                f"dataset.max_prompt_tokens={self.max_tokens}: the shortest of {len(rows)} "
                f"training prompts has {shortest} tokens, so none is left."
            )
        log.info(
            "%d training rows: their prompts are made as they are drawn; of a sample of %d, %d are "
            "longer than %d tokens. Longer ones are left out, and others drawn in their place.",
            len(self), len(rows), len(rows) - len(short), self.max_tokens,
        )  # fmt: skip

    def is_short(self, row: int) -> bool:
        own = self.sets[bisect_right(self.ends, row)]
        most = min(own.format.max_prompt_tokens, self.max_tokens)
        return len(self.get_prompt(row).token_ids) <= most

    def list_fitting(self) -> list[Prompt]:
        return [self.get_prompt(row) for row in range(len(self)) if self.fits(row)]

    def list_sources(self) -> list[str]:
        return [name for own in self.sets for name in [own.name] * len(own.examples)]

    def find_questions(self, questions: set[str]) -> set[str]:
        """Those of some questions that are trained on."""
        found: set[str] = set()
        for own in self.sets:
            rest = questions - own.left_out
            if rest:
                found.update(e.question for e in own.examples if e.question in rest)
        return found

    def _make(self, row: int) -> Prompt:
        at = bisect_right(self.ends, row)
        own, before = self.sets[at], self.ends[at - 1] if at else 0
        example = own.examples[row - before]
        return Prompt(*own.format.render(example, self.tokenizer), example)


@dataclass(frozen=True)
class PromptSets:
    train: list[Prompt] | LazyPrompts
    evaluation: list[Prompt]


def drop_held_out(
    train: Sequence[Example], evaluation: Sequence[Example], key: str
) -> Sequence[Example]:
    """The training rows that are no evaluation rows; what is left out is counted, out loud."""
    held_out = {example.question for example in evaluation}
    apart: Sequence[Example]
    if isinstance(train, Examples):
        apart = train.drop_questions(held_out)
    else:
        apart = [example for example in train if example.question not in held_out]
    if not apart:
        raise ConfigError(
            f"{key}: every training row is an evaluation row too; choose another {key}.slice or "
            f"{key}.eval_slice, or {key}.allow_overlap=true."
        )
    if len(apart) < len(train):
        log.warning(
            "%d training rows are evaluation rows too and are not trained on "
            "(%s.allow_overlap=true keeps them).",
            len(train) - len(apart),
            key,
        )
    return apart


def tokenize_examples(
    examples: Sequence[Example],
    format: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    role: str,
    key: str,
) -> list[Prompt]:
    """Examples as prompts; those that are too long are dropped and counted, out loud.

    Args:
        role, key: what they are for and where their config is, for the messages.
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
            f"{shortest} tokens, so none is left."
        )
    return kept
