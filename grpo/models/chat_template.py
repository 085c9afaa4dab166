"""Renders a model's chat template, which is a program from the model's author and may fail."""

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
    """Renders a chat as text.

    Args:
        options: passed to the template.
        add_generation_prompt: the text ends where the assistant's answer begins.

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
    except Exception as error:  # the template or its filters may raise anything
        raise ConfigError(format_error(error)) from error


def render_question(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    options: Mapping[str, Any],
    key: str,
) -> str:
    """Renders a chat whose last message is the question.

    Args:
        key: the config key of the data set, for error messages.

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
            f"{key}.chat=true: the model's chat template leaves the question out (it may need "
            f"messages in parts); {key}.chat=false uses plain text."
        )
    return text


def explain_template_error(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    options: Mapping[str, Any],
    key: str,
    reason: str,
) -> str:
    """Returns a message that says why a template can't be rendered, and which key to set."""
    plain = f"{key}.chat=false uses plain text"
    if isinstance(tokenizer.chat_template, dict) and "chat_template" not in options:
        names = ", ".join(tokenizer.chat_template)
        return (
            f"{key}.chat=true: the model has several chat templates and no default: "
            f"+{key}.template_options.chat_template=NAME chooses one of {names}; {plain}."
        )
    rest = [message for message in messages if message["role"] != "system"]
    if len(rest) < len(messages):
        try:
            render_chat(tokenizer, rest, options, add_generation_prompt=True)
        except ConfigError:
            pass  # the system message is not the cause
        else:
            return (
                f"{key}.system_prompt: the model's chat template supports no system message "
                f"({reason}); set {key}.system_prompt=null, or remove system messages from the "
                f"rows."
            )
    return f"{key}.chat=true: the model's chat template can't be rendered ({reason}); {plain}."
