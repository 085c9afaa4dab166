"""Keeps secrets in the environment: the command takes none, and writes none into a file.

A key with a name like a secret's, or a value that looks like one, is refused if the value is
written out. `${oc.env:NAME}` is accepted, and every file keeps it unresolved. If an error quotes a
secret, the secret is replaced.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from grpo.errors import ConfigError

SECRET_KEY = re.compile(  # a key's last part
    r"(^|_)(pass(word|wd|phrase)|secret|credentials?|authorization|(api|access|secret|private)_?key"
    r"|(api|auth|access|refresh|bearer|hf|hub)_?token)$|^token$",
    re.IGNORECASE,
)
SECRET_WORD = re.compile(  # or the last word of it, where its value is a text and no number
    r"(^|[_-]|(?<=[a-z])(?=[A-Z]))(?i:(api)?(key|token|pw|pwd|pass|passwd|password|passphrase"
    r"|secret|credential|cred|auth|authorization)s?)$"
)
HARMLESS_WORD = re.compile(  # what the word before says: a token of the text, a key of a table
    r"(^|[_-])(eos|bos|pad|unk|sep|cls|mask|stop|end|start|begin|open|close|first|last|next|new"
    r"|image|audio|video|vision|think|thinking|answer|tool|role|chat|special|extra|added|bad|forced"
    r"|forbidden|banned|separator|newline|prompt|completion|max|min|num|sort|primary|foreign|group"
    r"|dict|json|column|row|field|label|text|input|output|question|gold|target|metric|cache|map"
    r"|partition|score|result|message|messages|content)[_-]?(key|token)s?$",
    re.IGNORECASE,
)
NUMBER = re.compile(r"[-+]?[\d._]+(e[-+]?\d+)?|true|false|null|", re.IGNORECASE)
SECRET_VARIABLE = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?|AUTHORIZATION)$")
URL_PASSWORD = re.compile(r"\w://[^/\s:@]*:([^/\s@]+)@")  # in a URL
SECRET_PATTERNS = (
    URL_PASSWORD,
    re.compile(r"https?://[^/\s:@]+@"),  # a token in a user's place
    re.compile(r"[?&][\w-]*(token|secret|password|signature|key)=[^&\s]{6,}", re.IGNORECASE),
    re.compile(r"\bBearer\s+\S{8,}"),
    re.compile(r"\b(hf_|sk-(\w+-){0,2}|gh[pousr]_|AKIA)[A-Za-z0-9]{16,}"),
    re.compile(r"\b(github_pat_|glpat-|xox[abprs]-|AIza)[\w-]{16,}"),
    re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+"),  # a JSON web token
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
)
CONFIG_SECRETS: set[str] = set()  # taken from the environment by keys that are named like secrets
MIN_SECRET_LENGTH = 8  # characters; a shorter value stands in texts that have nothing to do with it
REDACTED = "***"


def refuse_secrets(config: DictConfig) -> None:
    """Refuses a composed config, with Hydra's section, that contains a secret.

    Raises:
        ConfigError: names the key, and does not quote the secret.
    """
    whole = OmegaConf.to_container(config, resolve=False)
    assert isinstance(whole, dict)
    found = list(find_texts({k: v for k, v in whole.items() if k != "hydra"}))
    hydra = whole.get("hydra") or {}
    found += find_texts({k: hydra.get(k) for k in ("sweeper", "launcher")}, "hydra")
    job = hydra.get("job") or {}
    found += find_texts({part: job.get(part) for part in ("name", "env_set")}, "hydra.job")
    found += find_texts({part: hydra.get(part) for part in ("run", "sweep")}, "hydra")
    for overrides in (hydra.get("overrides") or {}).values():
        found += find_override_texts(overrides or ())
    for key, text in found:
        if is_secret(key, text):
            raise ConfigError(
                f"{key}: holds a secret, which the run's files would keep. Put it into the "
                f"environment, and write {key}='${{oc.env:NAME}}'."
            )


def is_secret(key: str, text: str) -> bool:
    """Returns whether a key's value is a secret."""
    if "${" in text:
        text = re.sub(r"\$\{[^}]*\}", "", text)
        return any(look.search(text) for look in SECRET_PATTERNS)
    last = key.rpartition(".")[2]
    named = SECRET_KEY.search(last) or (
        is_secret_key(key) and not NUMBER.fullmatch(text.strip("'\""))
    )
    return bool(named and text) or any(look.search(text) for look in SECRET_PATTERNS)


def is_secret_key(key: str) -> bool:
    """Returns whether a key has a name like a secret's: judge_key has, eos_token hasn't."""
    last = key.rpartition(".")[2]
    named = SECRET_KEY.search(last) or SECRET_WORD.search(last)
    return bool(named) and not HARMLESS_WORD.search(last)


def find_texts(node: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Yields every text in a config, with its dotted key.

    Args:
        name: of the node itself.
    """
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from find_texts(value, f"{name}.{key}" if name else str(key))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from find_texts(value, name)
    elif isinstance(node, str):
        yield name, node


def find_override_texts(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields every text in overrides, and in each value of a sweep's overrides, with its key."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.is_delete():
            continue
        # Of a range there may be a million, none of which is a text.
        values = (
            override.sweep_iterator()
            if override.is_choice_sweep()
            else [override.get_value_string()]
        )
        for value in values:
            yield override.key_or_group, str(value)


def resolve_without_secrets(config: DictConfig) -> dict[str, Any]:
    """Returns a config as plain Python, with all interpolations resolved but the environment's.

    `${oc.env:NAME}`, and what refers to it, stays as it is written.
    """
    written, resolved = (
        OmegaConf.to_container(config, resolve=resolve) for resolve in (False, True)
    )
    assert isinstance(resolved, dict)
    hidden = set(find_environment_texts(written, resolved))
    return {str(key): value for key, value in hide_texts(written, resolved, hidden).items()}


def find_environment_texts(written: Any, resolved: Any) -> Iterator[str]:
    """Returns the values of each `${oc.env:NAME}` in a config that are texts."""
    if isinstance(written, str):
        if "oc.env" in written and isinstance(resolved, str) and resolved:
            yield resolved
    elif isinstance(written, dict):
        for key, item in written.items():
            yield from find_environment_texts(item, resolved[key])
    elif isinstance(written, list):
        for item, value in zip(written, resolved, strict=True):
            yield from find_environment_texts(item, value)


def hide_texts(written: Any, resolved: Any, hidden: set[str]) -> Any:
    """Returns a resolved node, in which hidden texts are replaced by what the config says."""
    if isinstance(written, dict):
        return {key: hide_texts(item, resolved[key], hidden) for key, item in written.items()}
    if isinstance(written, list):
        return [
            hide_texts(item, value, hidden) for item, value in zip(written, resolved, strict=True)
        ]
    referring = isinstance(written, str) and "${" in written
    texts = [text for _, text in find_texts(resolved)] if referring else []
    return (
        written
        if any(text_to_hide in text for text_to_hide in hidden for text in texts)
        else resolved
    )


def remember_secrets(config: DictConfig) -> None:
    """Makes `redact` know the values that keys with names like secrets' get from the environment.

    The names of the variables don't matter.
    """
    written, resolved = (
        OmegaConf.to_container(config, resolve=resolve) for resolve in (False, True)
    )
    hidden = set(find_environment_texts(written, resolved))
    for key, text in find_texts(resolved):
        if is_secret_key(key):
            CONFIG_SECRETS.update(secret for secret in hidden if secret in text)


def redact(text: str) -> str:
    """Removes the environment's secrets from a text, as a service's error may quote them."""
    for secret in sorted(find_environment_secrets(), key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    return text


def find_environment_secrets() -> set[str]:
    """Returns the environment's secrets that `redact` removes.

    They are the values of variables with names like secrets', passwords in URLs, and the values
    that `remember_secrets` found.
    """
    found = {value for name, value in os.environ.items() if SECRET_VARIABLE.search(name.upper())}
    found |= {password for value in os.environ.values() for password in URL_PASSWORD.findall(value)}
    found |= CONFIG_SECRETS
    return {value for value in found if len(value) >= MIN_SECRET_LENGTH}


class SecretFilter(logging.Filter):
    """Removes the environment's secrets from log records and their tracebacks."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), None
        if record.exc_info:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        return True


def redact_logs() -> None:
    """Adds the filter to every handler of the root logger."""
    for handler in logging.getLogger().handlers:
        if not any(isinstance(known, SecretFilter) for known in handler.filters):
            handler.addFilter(SecretFilter())
