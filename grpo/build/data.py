"""Builds prompts, rewards and evaluation from a config."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from grpo.build.objective import build_sampling
from grpo.config.binding import bind, check_options, resolve_node
from grpo.data.order import Order, order_mix, order_one_set
from grpo.data.prompts import (
    LazyPrompts,
    LazyPromptSet,
    PromptFormat,
    PromptSets,
    WorkedExample,
    drop_held_out,
    tokenize_examples,
)
from grpo.data.rows import MAX_EAGER_ROWS
from grpo.errors import ConfigError
from grpo.locate import PROMPT_KEYS, RunInputs
from grpo.rewards import WeightedReward
from grpo.training.difficulty import Curriculum
from grpo.training.evaluation import Evaluation
from grpo.training.sampler import Sampler
from grpo.types import Prompt

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
REWARD_KEYS = ("weight", "sources")  # of any reward, beside its callable's options


def build_prompt_format(dataset: DictConfig, key: str) -> PromptFormat:
    """Builds the prompt format that a data set's config describes.

    Args:
        key: the config key of the data set.

    Raises:
        ConfigError: an option is missing or has a wrong value.
    """
    options = resolve_node(dataset)
    for name in PROMPT_KEYS:
        if name not in options:
            raise ConfigError(
                f"{key}.{name} is not set: begin the data set's file with defaults: [_base, _self_]"
            )
    keys = {name: options[name] for name in PROMPT_KEYS if name != "allow_overlap"}
    check_options(PromptFormat, keys, key)
    try:
        worked = tuple(WorkedExample(**example) for example in keys.pop("worked_examples"))
    except TypeError as error:
        raise ConfigError(f"{key}.worked_examples: each needs a question and an answer.") from error
    if not isinstance(options["allow_overlap"], bool):
        raise ConfigError(
            f"{key}.allow_overlap={options['allow_overlap']}: should be bool.",
            key=f"{key}.allow_overlap",
            value=options["allow_overlap"],
        )
    return PromptFormat(worked_examples=worked, **keys)


def build_prompts(
    found: RunInputs, formats: Sequence[PromptFormat], tokenizer: PreTrainedTokenizerBase
) -> PromptSets:
    """Builds the prompts to train and to evaluate on, without overlap unless it is allowed.

    Raises:
        ConfigError: no prompts of a set are left.
    """
    evaluated = [example for part in found.sets for example in part.evaluation]
    lazy = any(len(part.train) > MAX_EAGER_ROWS for part in found.sets)
    train: list[Prompt] = []
    lazy_sets: list[LazyPromptSet] = []
    evaluation: list[Prompt] = []
    for part, format in zip(found.sets, formats, strict=True):
        keep_overlap = part.options.allow_overlap or not part.train
        rows = part.train if keep_overlap else drop_held_out(part.train, evaluated, part.key)
        if lazy:
            left_out = frozenset(() if keep_overlap else (row.question for row in evaluated))
            lazy_sets.append(LazyPromptSet(rows, format, left_out, part.name))
        elif rows:
            train += tokenize_examples(rows, format, tokenizer, "training", part.key)
        evaluation += tokenize_examples(part.evaluation, format, tokenizer, "evaluation", part.key)
    return PromptSets(LazyPrompts(lazy_sets, tokenizer) if lazy else train, evaluation)


def build_order(prompts: Sequence[Prompt], found: RunInputs, cfg: DictConfig) -> Order:
    if len(found.sets) == 1:
        return order_one_set(len(prompts), cfg.seed, shuffled=cfg.curriculum.order == "shuffled")
    probabilities = {part.name: part.probability for part in found.sets}
    if isinstance(prompts, LazyPrompts):
        sources = prompts.list_sources()
    else:
        sources = [prompt.example.source for prompt in prompts]
    for name in probabilities:
        if name not in sources:
            raise ConfigError(f"dataset.sets.{name}: none of its prompts is left to train on.")
    return order_mix(sources, probabilities, cfg.seed)


def build_curriculum(cfg: DictConfig) -> Curriculum:
    return Curriculum(**resolve_node(cfg.curriculum))


def build_rewards(cfg: DictConfig, found: RunInputs) -> dict[str, WeightedReward]:
    """Builds the rewards: an instance of a class, or a function with its options bound."""
    rewards = {}
    names = [part.name for part in found.sets]
    for name, node in cfg.reward.items():
        options = {k: v for k, v in resolve_node(node).items() if k not in REWARD_KEYS}
        bound = bind(options, f"reward.{name}", REWARD_KEYS)
        function = (
            instantiate_reward(bound, f"reward.{name}") if inspect.isclass(bound.func) else bound
        )
        if missing := find_missing_options(function):
            raise ConfigError(
                f"reward.{name}._target_={node._target_}: needs `{missing[0]}`: add "
                f"+reward.{name}.{missing[0]}=…",
                key=f"reward.{name}.{missing[0]}",
            )
        if not accepts_samples(function):
            raise ConfigError(
                f"reward.{name}._target_={node._target_}: should be called with a list of samples "
                f"and no more than the options given."
            )
        sources = node.get("sources")
        for source in sources or []:
            if source not in names:
                raise ConfigError(
                    f"reward.{name}.sources={sources}: the data has no set {source}; there are "
                    f"{', '.join(filter(None, names)) or 'none, because it is not a mix'}."
                )
        only = None if sources is None else frozenset(sources)
        rewards[str(name)] = WeightedReward(function, float(node.get("weight", 1.0)), only)
    return rewards


def instantiate_reward(bound: functools.partial[Any], key: str) -> Any:
    """Instantiates a reward class.

    Raises:
        ConfigError: its constructor raised; the message begins with the reward's key.
    """
    if missing := find_missing_options(bound, given=0):
        raise ConfigError(
            f"{key}._target_: {bound.func.__qualname__} needs `{missing[0]}`: add "
            f"+{key}.{missing[0]}=…",
            key=f"{key}.{missing[0]}",
        )
    try:
        return bound()
    except ConfigError as error:
        names_option = str(error).partition("=")[0] in bound.keywords
        raise ConfigError(
            f"{key}{'.' if names_option else ': '}{error}",
            key=f"{key}.{error.key}" if names_option else key,
            value=error.value,
        ) from error
    except Exception as error:
        raise ConfigError(f"{key}: can't be made ({type(error).__name__}: {error}).") from error


def find_missing_options(function: Any, given: int = 1) -> list[str]:
    """Returns the required parameters that no key gives, beyond `given` positional ones."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return []
    required = [p for p in parameters if p.default is p.empty and p.kind not in VARIADIC]
    positional = [p for p in required if p.kind is not p.KEYWORD_ONLY]
    keyword = [p for p in required if p.kind is p.KEYWORD_ONLY]
    lacking = [p for p in (*positional[given:], *keyword) if p.kind is not p.POSITIONAL_ONLY]
    return [p.name for p in lacking]


def accepts_samples(function: Any) -> bool:
    try:
        inspect.signature(function).bind([])
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return callable(function)
    return True


def build_evaluation(
    cfg: DictConfig,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    train: Sequence[Prompt] = (),
) -> Evaluation:
    sampling = replace(build_sampling(cfg), temperature=cfg.eval.temperature)
    if isinstance(train, LazyPrompts):
        trained = train.find_questions({prompt.example.question for prompt in prompts})
    else:
        trained = {prompt.example.question for prompt in train}
    overlap = sum(prompt.example.question in trained for prompt in prompts) / len(prompts)
    return Evaluation(sampler, prompts, cfg.eval.samples, cfg.eval.greedy, sampling, overlap)
