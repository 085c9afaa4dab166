"""Where a completion ends, and how one becomes text.

A completion ends with any token that a source names as an end: the generation config, the model's
config, the tokenizer, or the chat template, which writes one behind what the assistant says. Its
text is all that the model wrote but these ends, padding and the token that begins a text: other
special tokens may be tags that a reward looks for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.errors import ConfigError
from grpo.models.chat_template import render_chat

log = logging.getLogger(__name__)

PROBE_ANSWER = "7f3a9c"  # what the assistant is made to say, to see what stands behind it


def find_end_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> tuple[int, ...]:
    """Every token that ends a completion, those of the generation config first.

    Raises:
        ConfigError: nothing names one, or only one that the model can't write where that would
            have to be the padding, too.
    """
    generation = model.generation_config
    # Without a file of its own it repeats the model's config, where a class has an end by default,
    # which may be any word of this vocabulary.
    repeats = generation is None or getattr(generation, "_from_model_config", False)
    named = [] if repeats else parse_token_ids(generation.eos_token_id, tokenizer)
    in_config = parse_token_ids(
        getattr(model.config.get_text_config(), "eos_token_id", None), tokenizer
    )
    others = [*parse_token_ids(tokenizer.eos_token_id, tokenizer), *find_template_end(tokenizer)]
    special = find_special_ids(tokenizer)
    sure = [id for id in in_config if id in special or not (named or others)]
    every = tuple(dict.fromkeys([*named, *sure, *others]))
    written = tuple(id for id in every if 0 <= id < vocabulary)
    if not written and (not every or tokenizer.pad_token_id is None):
        raise ConfigError(
            f"{type(model).__name__}: neither its configs nor its tokenizer name an "
            f"end-of-sequence token within its vocabulary of {vocabulary}."
        )
    if not written:
        log.warning(
            "%s has no token that ends a completion: of its vocabulary of %d, none is %s. "
            "Every completion will have max_new_tokens tokens.",
            type(model).__name__, vocabulary, " or ".join(map(str, every)),
        )  # fmt: skip
    return written or every


def parse_token_ids(named: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids from what a config names: one or several, as numbers or as the tokens."""
    if isinstance(named, list | tuple):
        return [id for one in named for id in parse_token_ids(one, tokenizer)]
    if isinstance(named, str):
        named = tokenizer.get_vocab().get(named)
    return [named] if isinstance(named, int) and not isinstance(named, bool) else []


def find_template_end(tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """The added token that a chat template writes right behind an assistant's message, if any."""
    if tokenizer.chat_template is None:
        return
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE_ANSWER}]
    try:
        text = render_chat(tokenizer, messages, {}, add_generation_prompt=False)
    except ConfigError:
        return  # what is wrong with it is said where prompts are made
    _, said, behind = text.rpartition(PROBE_ANSWER)
    behind = behind.lstrip()
    added = {str(token): id for id, token in tokenizer.added_tokens_decoder.items()}
    ends = [token for token in added if token and behind.startswith(token)]
    if said and ends and tokenizer.bos_token not in ends:
        yield added[max(ends, key=len)]


def find_special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that are no part of ordinary text."""
    return {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}


@dataclass(frozen=True)
class Decoder:
    """Completions' tokens to text, the same way everywhere."""

    tokenizer: PreTrainedTokenizerBase
    skipped_ids: frozenset[int]  # ends, padding, the token that begins a text

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        kept = [[id for id in row if id not in self.skipped_ids] for row in rows]
        found: list[str] = self.tokenizer.batch_decode(kept, skip_special_tokens=False)
        return found

    def decode_tokens(self, ids: Sequence[int]) -> str:
        return self.decode_batch([ids])[0]


def find_skipped_ids(
    tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], pad: int
) -> frozenset[int]:
    """What a text doesn't show. An end that is an ordinary word, as a line break, is shown."""
    unshown = {*ends, pad, tokenizer.bos_token_id, tokenizer.eos_token_id}
    return frozenset(unshown & find_special_ids(tokenizer))
