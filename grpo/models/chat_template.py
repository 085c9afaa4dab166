"""A model's chat template, which is a program of its maker's and may raise anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grpo.errors import ConfigError, format_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    options: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
) -> str:
    """The text of a chat.

    Args:
        options: of the template itself.
        answers: the assistant is to speak next.

    Raises:
        ConfigError: the template can't be rendered.
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **options,
            )
        )
    except Exception as error:  # whatever the template or its filters raise is about the template
        raise ConfigError(format_error(error)) from error


def render_question(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    options: Mapping[str, Any],
    key: str,
) -> str:
    """The text of a chat whose last message is to be answered.

    Args:
        key: where the data set's config is, for the messages.

    Raises:
        ConfigError: the template refuses a message, or leaves the question out.
    """
    try:
        text = render_chat(tokenizer, messages, options, add_generation_prompt=True)
    except ConfigError as error:
        raise ConfigError(
            explain_template_error(tokenizer, messages, options, key, str(error))
        ) from error
    if messages[-1]["content"].strip() not in text:
        raise ConfigError(
            f"{key}.chat=true: the model's chat template leaves the question out (it may want "
            f"messages in parts); {key}.chat=false puts plain text."
        )
    return text


def explain_template_error(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    options: Mapping[str, Any],
    key: str,
    reason: str,
) -> str:
    """Why a template can't be rendered, and which key to set."""
    plain = f"{key}.chat=false puts plain text"
    if isinstance(tokenizer.chat_template, dict) and "chat_template" not in options:
        names = ", ".join(tokenizer.chat_template)
        return (
            f"{key}.chat=true: the model has several chat templates and none is its default: "
            f"+{key}.template_options.chat_template=NAME chooses one of {names}; {plain}."
        )
    rest = [message for message in messages if message["role"] != "system"]
    if len(rest) < len(messages):
        try:
            render_chat(tokenizer, rest, options, add_generation_prompt=True)
        except ConfigError:
            pass  # the system message is not what is wrong
        else:
            return (
                f"{key}.system_prompt: the model's chat template takes no system message "
                f"({reason}); set {key}.system_prompt=null, or leave system messages out of the "
                f"rows."
            )
    return f"{key}.chat=true: the model's chat template can't be rendered ({reason}); {plain}."
