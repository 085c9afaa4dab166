"""Examples to prompts: the chat the model reads, as text and as tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.errors import ConfigError
from grpo.models.chat_template import render_question
from grpo.types import Example, Prompt

log = logging.getLogger(__name__)


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

    def messages(self, example: Example) -> list[Mapping[str, str]]:
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
        messages = self.messages(example)
        if not self.chat or tokenizer.chat_template is None:
            text = "\n\n".join(message["content"] for message in messages)
            text = text + "\n\n" if self.chat else text
            return text, prompt_ids(text, tokenizer, begins=True)
        text = render_question(tokenizer, messages, self.template_options, key)
        return text, prompt_ids(text, tokenizer, begins=False)


def prompt_ids(text: str, tokenizer: PreTrainedTokenizerBase, *, begins: bool) -> tuple[int, ...]:
    """The tokens of a text that is to be continued: begun once, and not ended.

    Args:
        begins: what the tokenizer puts before every text goes before this one; a chat template
            writes it itself.
    """
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if begins:
        before = put_before(ids, tokenizer.encode(text))
        written = [n for n in range(len(before) + 1) if before[len(before) - n :] == ids[:n]]
        ids = [*before, *ids[max(written) :]]
    ends_with_it = text.endswith(tokenizer.eos_token or " ")
    while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not ends_with_it:
        ids = ids[:-1]
    return tuple(ids)


def put_before(ids: Sequence[int], whole: Sequence[int]) -> list[int]:
    """The special tokens that stand before a text's own."""
    if not ids:
        return list(whole)
    for start in range(len(whole) - len(ids) + 1):
        if whole[start : start + len(ids)] == ids:
            return list(whole[:start])
    return []


@dataclass(frozen=True)
class PromptSets:
    train: list[Prompt]
    evaluation: list[Prompt]


def without_held_out(
    train: Sequence[Example], evaluation: Sequence[Example], key: str
) -> list[Example]:
    """The training rows that are no evaluation rows; what is left out is counted, out loud."""
    held_out = {example.question for example in evaluation}
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


def tokenized(
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
