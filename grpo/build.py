"""Parts from a config: each key is read here, once, and becomes what the rest works with."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo.config.binding import bind, check_options, named, plain
from grpo.config.overrides import key_of
from grpo.data.order import Order, mixed, one_set
from grpo.data.prompts import (
    DrawnPrompts,
    DrawnSet,
    PromptFormat,
    PromptSets,
    WorkedExample,
    tokenized,
    without_held_out,
)
from grpo.data.rows import EAGER
from grpo.device import Device, open_device
from grpo.errors import ConfigError
from grpo.locate import PROMPT_KEYS, Found
from grpo.memory.allocator import LARGEST, LARGEST_IN_BF16, keep_freed_memory
from grpo.memory.budget import Budget
from grpo.memory.estimate import Work, budget_of, held_by
from grpo.models.adapter import Adapter, add_adapter
from grpo.models.files import is_quantized
from grpo.models.hub import commit_of, from_hub
from grpo.models.load import LanguageModel, load_language_model
from grpo.models.recompute import recomputable
from grpo.models.reference import reference_of
from grpo.objective import (
    AGGREGATES,
    AVERAGINGS,
    BASELINES,
    DIVERGENCES,
    ESTIMATORS,
    RATIOS,
    SCALES,
    AdaptiveWeight,
    Normalize,
)
from grpo.rewards import WeightedReward
from grpo.rollout import Engine, HFEngine, NativeEngine
from grpo.rollout.trial import check_sampler
from grpo.training.difficulty import Curriculum
from grpo.training.evaluation import Evaluation
from grpo.training.kl_penalty import KLPull, Pull
from grpo.training.loss import KLTerm, Objective
from grpo.training.optimizer import SCHEDULES, Optimizer
from grpo.types import Prompt, Sampling

log = logging.getLogger(__name__)


def build_device(cfg: DictConfig) -> Device:
    device = open_device(cfg.device.kind, cfg.device.precision)
    if device.torch_device.type == "cpu":
        keep_freed_memory(LARGEST if device.autocast_dtype is None else LARGEST_IN_BF16)
    return device


def build_policy(cfg: DictConfig, found: Found, device: Device) -> tuple[LanguageModel, str]:
    """The model that is trained, under a fresh adapter where one is asked for; its fingerprint."""
    adapter, folder = build_adapter(cfg), found.model()
    policy = load_model(cfg, folder, device, frozen=adapter is not None)
    if getattr(policy.model, "is_quantized", False) and is_quantized(folder):
        raise ConfigError(
            f"model={cfg.model.name}: its weights are quantized already, so they can't be trained; "
            f"take the model that they were made of, which adapter=qlora puts in 4 bits."
        )
    if adapter is not None:
        add_adapter(policy.model, adapter, cfg.seed)
    # A checkpoint of an adapter names its base: by id where that is how it is found again.
    name = cfg.model.id if cfg.model.id and from_hub(folder) else policy.base
    commit = commit_of(folder) if name == cfg.model.id else None
    if cfg.device.gradient_checkpointing and not recomputable(policy.model):
        raise ConfigError(
            f"device.gradient_checkpointing=true: {type(policy.model).__name__} has no layers that "
            f"can be recomputed."
        )
    recompute = cfg.device.gradient_checkpointing
    return replace(policy, base=name, commit=commit, recompute=recompute), policy.fingerprint


def load_model(cfg: DictConfig, folder: Path, device: Device, frozen: bool) -> LanguageModel:
    """The model in a folder, in 4 bits where the adapter over it asks for that.

    frozen: as `load_language_model` says.
    """
    adapter = build_adapter(cfg)
    quantized = adapter is not None and adapter.quantized
    return load_language_model(folder, device, quantized, frozen, cfg.model.trust_remote_code)


def build_budget(
    cfg: DictConfig, policy: LanguageModel, longest: int, with_reference: bool
) -> Budget:
    """How much is computed at once, given the tokens of the longest prompt and completion."""
    work = Work(
        prompt=longest - cfg.max_new_tokens,
        completion=cfg.max_new_tokens,
        group=cfg.num_generation,
        optimizer=cfg.optim.name,
        reference=with_reference,
        reference_moves=cfg.kl.sync_every > 0,
    )
    asked, device = cfg.device, policy.device.torch_device
    held = held_by(policy, work)
    return budget_of(device, asked.memory_gb, asked.token_budget, asked.cache_budget, held, longest)


def build_adapter(cfg: DictConfig) -> Adapter | None:
    return None if cfg.adapter is None else Adapter(**plain(cfg.adapter))


def prompt_format(dataset: DictConfig, key: str) -> PromptFormat:
    """How a data set's config says that a question is put. key: where that config is."""
    options = plain(dataset)
    for name in PROMPT_KEYS:
        if name not in options:
            raise ConfigError(
                f"{key}.{name} is not set: a data set's file begins with defaults: [_base, _self_]"
            )
    keys = {name: options[name] for name in PROMPT_KEYS if name != "allow_overlap"}
    check_options(PromptFormat, keys, key)
    try:
        worked = tuple(WorkedExample(**example) for example in keys.pop("worked_examples"))
    except TypeError as error:
        raise ConfigError(f"{key}.worked_examples: each needs a question and an answer.") from error
    if not isinstance(options["allow_overlap"], bool):
        raise ConfigError(f"{key}.allow_overlap={options['allow_overlap']}: should be bool.")
    return PromptFormat(worked_examples=worked, **keys)


def build_prompts(
    found: Found, formats: Sequence[PromptFormat], tokenizer: PreTrainedTokenizerBase
) -> PromptSets:
    """The prompts to train and to evaluate on, without overlap unless asked for.

    Raises:
        ConfigError: nothing is left of one of them.
    """
    evaluated = [example for own in found.sets for example in own.evaluation]
    many = any(len(own.train) > EAGER for own in found.sets)
    train: list[Prompt] = []
    drawn: list[DrawnSet] = []
    evaluation: list[Prompt] = []
    for own, format in zip(found.sets, formats, strict=True):
        keep = own.options.allow_overlap or not own.train
        rows = own.train if keep else without_held_out(own.train, evaluated, own.key)
        if many:
            left_out = frozenset(() if keep else (example.question for example in evaluated))
            drawn.append(DrawnSet(rows, format, left_out, own.name))
        elif rows:
            train += tokenized(rows, format, tokenizer, "training", own.key)
        evaluation += tokenized(own.evaluation, format, tokenizer, "evaluation", own.key)
    return PromptSets(DrawnPrompts(drawn, tokenizer) if many else train, evaluation)


def build_order(prompts: Sequence[Prompt], found: Found, cfg: DictConfig) -> Order:
    if len(found.sets) == 1:
        return one_set(len(prompts), cfg.seed, shuffled=cfg.curriculum.order == "shuffled")
    probabilities = {own.name: own.probability for own in found.sets}
    if isinstance(prompts, DrawnPrompts):
        sources = prompts.sources()
    else:
        sources = [prompt.example.source for prompt in prompts]
    for name in probabilities:
        if name not in sources:
            raise ConfigError(f"dataset.sets.{name}: none of its prompts is left to train on.")
    return mixed(sources, probabilities, cfg.seed)


def build_curriculum(cfg: DictConfig) -> Curriculum:
    return Curriculum(**plain(cfg.curriculum))


def build_rewards(cfg: DictConfig, found: Found) -> dict[str, WeightedReward]:
    """Each named callable: a class is made with its options, a function is called with them."""
    rewards = {}
    names = [own.name for own in found.sets]
    for name, node in cfg.reward.items():
        options = {k: v for k, v in plain(node).items() if k not in ("weight", "sources")}
        bound = bind(options, f"reward.{name}")
        function = made(bound, f"reward.{name}") if inspect.isclass(bound.func) else bound
        if not takes_samples(function):
            raise ConfigError(
                f"reward.{name}._target_={node._target_}: should be called with a list of samples "
                f"and no more than the options given."
            )
        sources = node.get("sources")
        for source in sources or []:
            if source not in names:
                raise ConfigError(
                    f"reward.{name}.sources={sources}: the data has no set {source}; there are "
                    f"{', '.join(filter(None, names)) or 'none, for it is no mix'}."
                )
        only = None if sources is None else frozenset(sources)
        rewards[str(name)] = WeightedReward(function, float(node.weight), only)
    return rewards


def made(bound: functools.partial[Any], key: str) -> Any:
    """An instance of a user's class; what its constructor raises is refused under its key."""
    try:
        return bound()
    except ConfigError as error:
        own = str(error).partition("=")[0] in bound.keywords
        raise ConfigError(f"{key}{'.' if own else ': '}{error}") from error
    except Exception as error:
        raise ConfigError(f"{key}: can't be made ({type(error).__name__}: {error}).") from error


def takes_samples(function: Any) -> bool:
    try:
        inspect.signature(function).bind([])
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return callable(function)
    return True


def build_engine(
    make_engine: functools.partial[Any], policy: LanguageModel, max_new_tokens: int, budget: Budget
) -> Engine:
    """The sampler, tried on a few tokens first where that is cheap.

    Raises:
        ConfigError: it can't sample from this model, or samples from something else than it.
    """
    if make_engine.func in (NativeEngine, HFEngine):
        check_sampler(make_engine, policy)
    engine: Engine = make_engine(policy=policy, max_new_tokens=max_new_tokens, budget=budget)
    return engine


def build_sampling(cfg: DictConfig) -> Sampling:
    options = plain(cfg.sampling)
    return Sampling(temperature=cfg.temperature, **options | {"stop": tuple(options["stop"])})


def build_evaluation(
    cfg: DictConfig,
    engine: Engine,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, WeightedReward],
    train: Sequence[Prompt] = (),
) -> Evaluation:
    sampling = replace(build_sampling(cfg), temperature=cfg.eval.temperature)
    if isinstance(train, DrawnPrompts):
        trained = train.asked({prompt.example.question for prompt in prompts})
    else:
        trained = {prompt.example.question for prompt in train}
    overlap = sum(prompt.example.question in trained for prompt in prompts) / len(prompts)
    return Evaluation(
        engine, prompts, rewards, cfg.eval.samples, cfg.eval.greedy, sampling, overlap
    )


def build_objective(cfg: DictConfig) -> Objective:
    algorithm = cfg.algorithm
    return Objective(
        ratio=named(algorithm.ratio, RATIOS, "algorithm.ratio"),
        policy_loss=bind(algorithm.policy_loss, "algorithm.policy_loss"),
        averaging=named(algorithm.averaging, AVERAGINGS, "algorithm.averaging"),
        kl=build_kl_term(cfg),
        sampling=build_sampling(cfg),
        max_tokens=cfg.max_new_tokens,
        entropy_weight=algorithm.entropy_weight,
        mask_truncated=algorithm.mask_truncated,
        top_entropy=algorithm.top_entropy,
        importance_cap=algorithm.importance_cap,
        num_iterations=algorithm.num_iterations,
        minibatches=algorithm.minibatches,
    )


def build_advantage(cfg: DictConfig) -> Callable[..., Tensor]:
    """Rewards [R, B, G], weights [R] and a penalty [B, G] to take off, if any -> [B, G].

    Raises:
        ConfigError: a function of the user's own has no place for a divergence, and there is one.
    """
    algorithm = cfg.algorithm
    normalize = Normalize(
        named(algorithm.baseline, BASELINES, "algorithm.baseline"),
        named(algorithm.scale, SCALES, "algorithm.scale"),
    )
    aggregate = named(algorithm.aggregate, AGGREGATES, "algorithm.aggregate")
    in_reward = cfg.kl.within == "reward" and cfg.kl_weight > 0
    if in_reward and algorithm.aggregate not in AGGREGATES and not takes(aggregate, "penalty_BG"):
        raise ConfigError(
            f"algorithm.aggregate={algorithm.aggregate}: has no parameter penalty_BG for the KL "
            f"that kl.within=reward takes off; add it, or use kl.within=loss."
        )

    return functools.partial(aggregate, normalize=normalize)


def takes(function: Callable[..., Any], parameter: str) -> bool:
    try:
        return parameter in inspect.signature(function).parameters
    except ValueError:  # a builtin without a signature
        return False


def build_kl_term(cfg: DictConfig) -> KLTerm | None:
    """None without a reference: kl=none, or a weight of 0."""
    kl = cfg.kl
    if kl.estimator is None or cfg.kl_weight == 0:
        return None
    if kl.estimator == "k1" and kl.within == "loss" and not kl.unbiased_gradient:
        log.warning(
            "kl=k1 in the loss has no gradient on average, so it doesn't pull; "
            "kl.unbiased_gradient=true or kl.within=reward gives it one (docs/kl.md)."
        )
    exact = kl.estimator == "full"
    table = {**ESTIMATORS[kl.direction], "full": None}
    return KLTerm(
        estimator=named(kl.estimator, table, "kl.estimator"),
        divergence=DIVERGENCES[kl.direction] if exact else None,
        in_reward=kl.within == "reward",
        unbiased_gradient=kl.unbiased_gradient,
    )


def tell_unused_kl(cfg: DictConfig, overrides: Sequence[str], choice: str) -> None:
    """Says that a KL was asked for, by these overrides or this choice, which has no weight."""
    own_weight = not OmegaConf.is_interpolation(cfg, "kl_weight")
    if own_weight or cfg.kl_weight > 0 or cfg.kl.estimator is None:
        return
    keys = [key_of(override) for override in overrides]
    asked = [key for key in keys if key == "kl" or key.startswith("kl.")]
    if asked or choice != "k3":
        log.warning(
            "%s is given, but this algorithm has no KL (algorithm.kl_weight=0): none is computed "
            "and no reference is loaded; kl_weight=0.02, for example, trains with it.",
            asked[0] if asked else f"kl={choice}",
        )


def build_pull(
    cfg: DictConfig, policy: LanguageModel, objective: Objective, budget: Budget
) -> Pull:
    if objective.kl is None:
        return Pull()
    return KLPull(
        policy,
        reference_of(policy, moves=cfg.kl.sync_every > 0),
        objective.kl,
        AdaptiveWeight(cfg.kl_weight, cfg.kl.target, cfg.kl.horizon),
        objective.sampling,
        budget.computed,
        cfg.kl.sync_every,
        cfg.kl.sync_share,
    )


def updates_of_step(cfg: DictConfig) -> int:
    return int(cfg.algorithm.num_iterations * cfg.algorithm.minibatches)


def build_optimizer(cfg: DictConfig, policy: LanguageModel, steps: int) -> Optimizer:
    return Optimizer(
        policy.model,
        cfg.optim.name,
        learning_rate=cfg.learning_rate,
        # The schedule counts updates.
        total_steps=steps * updates_of_step(cfg),
        schedule=SCHEDULES[cfg.optim.schedule],
        warmup_steps=cfg.optim.warmup_steps,
        weight_decay=cfg.optim.weight_decay,
        betas=(cfg.optim.betas[0], cfg.optim.betas[1]),
        max_grad_norm=cfg.optim.max_grad_norm,
    )
