"""Finds the tokens that end a completion, and decodes completions to text.

A completion ends with any token that one of these names as an end token: the generation config, the
model's config, the tokenizer, or the chat template, which writes one after the assistant's message.
The text leaves out end tokens, padding and the token that begins a text, and keeps other special
tokens, because they may be tags that a reward looks for.
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

PROBE_ANSWER = "7f3a9c"  # an assistant's message, to see what the template writes after it


def find_end_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> tuple[int, ...]:
    """Returns all tokens that end a completion, those of the generation config first.

    If none of them is in the vocabulary, it logs a warning and returns them all the same.

    Raises:
        ConfigError: no source names an end token; or none is in the vocabulary and the tokenizer
            has no padding token, for which an end token would be used.
    """
    generation = model.generation_config
    # Without a file, the generation config copies the model's config. There, the end token may be
    # the class's default, which can be any word of this vocabulary.
    repeats = generation is None or getattr(generation, "_from_model_config", False)
    named = [] if repeats else parse_token_ids(generation.eos_token_id, tokenizer)
    config_ids = parse_token_ids(
        getattr(model.config.get_text_config(), "eos_token_id", None), tokenizer
    )
    others = [*parse_token_ids(tokenizer.eos_token_id, tokenizer), *find_template_end(tokenizer)]
    special = find_special_ids(tokenizer)
    trusted = [id for id in config_ids if id in special or not (named or others)]
    end_ids = tuple(dict.fromkeys([*named, *trusted, *others]))
    in_vocabulary = tuple(id for id in end_ids if 0 <= id < vocabulary)
    if not in_vocabulary and (not end_ids or tokenizer.pad_token_id is None):
        raise ConfigError(
            f"{type(model).__name__}: neither its configs nor its tokenizer name an "
            f"end-of-sequence token within its vocabulary of {vocabulary}."
        )
    if not in_vocabulary:
        log.warning(
            "%s has no token that ends a completion: its vocabulary of %d tokens doesn't contain "
            "%s, so every completion will have max_new_tokens tokens.",
            type(model).__name__, vocabulary, " or ".join(map(str, end_ids)),
        )  # fmt: skip
    return in_vocabulary or end_ids


def parse_token_ids(named: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns token ids from a config's value: one or several ids or tokens; None gives none."""
    if isinstance(named, list | tuple):
        return [id for one in named for id in parse_token_ids(one, tokenizer)]
    if isinstance(named, str):
        named = tokenizer.get_vocab().get(named)
    return [named] if isinstance(named, int) and not isinstance(named, bool) else []


def find_template_end(tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """Yields the added token that a chat template writes after an assistant's message, if any."""
    if tokenizer.chat_template is None:
        return
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE_ANSWER}]
    try:
        text = render_chat(tokenizer, messages, {}, add_generation_prompt=False)
    except ConfigError:
        return  # rendering the prompts will report the error
    _, answer, after = text.rpartition(PROBE_ANSWER)
    after = after.lstrip()
    added = {str(token): id for id, token in tokenizer.added_tokens_decoder.items()}
    ends = [token for token in added if token and after.startswith(token)]
    if answer and ends and tokenizer.bos_token not in ends:
        yield added[max(ends, key=len)]


def find_special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the ids of added and special tokens, which ordinary text doesn't contain."""
    return {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}


@dataclass(frozen=True)
class Decoder:
    """Decodes completions' tokens to text, in the same way everywhere."""

    tokenizer: PreTrainedTokenizerBase
    skipped_ids: frozenset[int]  # end tokens, padding, the token that begins a text

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Returns the text of each row of token ids."""
        kept = [[id for id in row if id not in self.skipped_ids] for row in rows]
        found: list[str] = self.tokenizer.batch_decode(kept, skip_special_tokens=False)
        return found

    def decode_tokens(self, ids: Sequence[int]) -> str:
        """Returns the text of one completion's token ids."""
        return self.decode_batch([ids])[0]


def find_skipped_ids(
    tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], pad: int
) -> frozenset[int]:
    """Returns the tokens that a text leaves out.

    An end token that is ordinary text, such as a line break, is not left out.
    """
    skipped = {*ends, pad, tokenizer.bos_token_id, tokenizer.eos_token_id}
    return frozenset(skipped & find_special_ids(tokenizer))
