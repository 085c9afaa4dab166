"""Examples to prompts: the chat the model reads, as text and as tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from grpo.errors import ConfigError
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
    max_prompt_tokens: int
    allow_overlap: bool

    def render(
        self, question: str, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[str, tuple[int, ...]]:
        """A prompt's text and tokens: by the chat template, or as plain text without one."""
        messages = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        for worked in self.worked_examples:
            messages.append({"role": "user", "content": worked.question})
            messages.append({"role": "assistant", "content": worked.answer})
        messages.append({"role": "user", "content": question})
        if tokenizer.chat_template is None:
            text = "\n\n".join(message["content"] for message in messages) + "\n\n"
            return text, tuple(tokenizer.encode(text))
        text = str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
        return text, tuple(tokenizer.encode(text, add_special_tokens=False))


@dataclass(frozen=True)
class PromptSets:
    train: list[Prompt]
    evaluation: list[Prompt]


def build_prompts(
    train: Sequence[Example],
    evaluation: Sequence[Example],
    format: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
) -> PromptSets:
    """The prompts to train and to evaluate on, without overlap unless asked for.

    Raises:
        ConfigError: nothing is left of one of them.
    """
    if not format.allow_overlap:
        train = without_held_out(train, evaluation)
    return PromptSets(
        tokenized(train, format, tokenizer, "training"),
        tokenized(evaluation, format, tokenizer, "evaluation"),
    )


def without_held_out(train: Sequence[Example], evaluation: Sequence[Example]) -> list[Example]:
    """The training rows that are no evaluation rows; what is left out is counted, out loud."""
    held_out = {example.question for example in evaluation}
    apart = [example for example in train if example.question not in held_out]
    if not apart:
        raise ConfigError(
            "dataset: every training row is an evaluation row too; choose another dataset.slice or "
            "dataset.eval_slice, or dataset.allow_overlap=true."
        )
    if len(apart) < len(train):
        log.warning(
            "%d training rows are evaluation rows too and are not trained on "
            "(dataset.allow_overlap=true keeps them).",
            len(train) - len(apart),
        )
    return apart


def tokenized(
    examples: Sequence[Example],
    format: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    role: str,
) -> list[Prompt]:
    """Examples as prompts; those that are too long are dropped and counted, out loud."""
    prompts = [Prompt(*format.render(e.question, tokenizer), e) for e in examples]
    kept = [p for p in prompts if len(p.token_ids) <= format.max_prompt_tokens]
    if len(kept) < len(prompts):
        log.warning(
            "%d of %d %s prompts are longer than dataset.max_prompt_tokens=%d and are dropped.",
            len(prompts) - len(kept),
            len(prompts),
            role,
            format.max_prompt_tokens,
        )
    if not kept:
        shortest = min(len(p.token_ids) for p in prompts)
        raise ConfigError(
            f"dataset.max_prompt_tokens={format.max_prompt_tokens}: the shortest {role} prompt has "
            f"{shortest} tokens, so none is left."
        )
    return kept
