"""Checks a config before anything starts."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass

from omegaconf import DictConfig, ListConfig, OmegaConf

from grpo.config.check_algorithm import check_algorithm, check_kl, check_sampling
from grpo.config.check_parallel import check_parallel
from grpo.config.check_wandb import check_wandb
from grpo.config.extras import require_extra
from grpo.config.foreign_names import explain_foreign_name
from grpo.config.metric_names import (
    EVAL_METRICS,
    REWARD_METRICS,
    SOURCE_METRIC_PREFIXES,
    STEP_METRICS,
)
from grpo.config.schema import flatten_config
from grpo.config.suggest import find_nearest, format_suggestion
from grpo.config.validation import check_at_least, check_choice, check_positive, check_revision
from grpo.errors import ConfigError
from grpo.seeds import SEED_LIMIT

EXTRA_OF_TARGET = {  # the choice that names it, the package it imports, the extra that brings that
    "grpo.data.ReasoningGym": ("dataset=reasoning_gym", "reasoning_gym", "gym"),
    "grpo.rewards.Math": ("reward=math", "math_verify", "math"),
    "grpo.rollout.vllm.VLLMEngine": ("rollout=vllm", "vllm", "vllm"),
    "grpo.tracking.Trackio": ("tracking=trackio", "trackio", "dashboard"),
}
INT32_MAX = 2**31 - 1  # of whole numbers, and of tokens that are sampled together


def check_config(cfg: DictConfig) -> None:
    """Refuses a config that is wrong by itself, whatever the data and the model.

    Raises:
        ConfigError: names the key, its value, and what would be right.
    """
    check_known_keys(cfg)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]} is not set: give it as {missing[0]}=…", key=missing[0])
    for key in ("num_epochs", "batch_size", "num_generation", "max_new_tokens"):
        check_at_least(cfg, key, 1)
    for key in ("max_steps", "device.token_budget", "device.cache_budget"):
        check_at_least(cfg, key, 1, optional=True)
    for key in ("eval.every", "eval.samples", "optim.warmup_steps", "log_prompts"):
        check_at_least(cfg, key, 0)
    for key in ("kl_weight", "optim.weight_decay", "optim.max_grad_norm", "seed"):
        check_at_least(cfg, key, 0.0)
    check_sizes(cfg)
    for key in ("temperature", "learning_rate", "eval.temperature"):
        check_positive(cfg, key)
    if cfg.device.memory_gb is not None:
        check_positive(cfg, "device.memory_gb")
    check_sampling(cfg)
    check_algorithm(cfg)
    check_kl(cfg)
    check_choice(cfg, "objective", EVAL_METRICS)
    check_choice(cfg, "device.kind", ("auto", "cpu", "cuda", "mps"))
    check_choice(cfg, "device.precision", ("auto", "bf16", "fp32"))
    check_choice(cfg, "optim.schedule", ("constant", "linear", "cosine"))
    check_choice(cfg, "optim.name", ("adamw", "adamw_8bit"))
    if cfg.rollout.get("ahead", 0) not in (0, 1):
        raise ConfigError(
            f"rollout.ahead={cfg.rollout.ahead}: use 0 or 1.",
            key="rollout.ahead",
            value=cfg.rollout.ahead,
        )
    if "wandb" in cfg.tracking:
        check_wandb(cfg)
    check_model(cfg.model)
    check_rewards(cfg.reward)
    check_adapter(cfg)
    check_installed(cfg)
    check_curriculum(cfg)
    check_parallel(cfg)
    if cfg.doctor is not None:
        for key in ("doctor.patience", "doctor.window", "doctor.spikes"):
            check_at_least(cfg, key, 1)
    if not (cfg.eval.greedy or cfg.eval.samples):
        raise ConfigError("eval.samples=0 eval.greedy=false: that leaves nothing to evaluate.")


def check_known_keys(node: DictConfig, prefix: str = "") -> None:
    """Refuses a key that was added with + to a section with fixed keys: nothing would read it.

    Raises:
        ConfigError: names this project's key if it is one of another tool, else the nearest keys.
    """
    kind = OmegaConf.get_type(node)
    known = [field.name for field in fields(kind)] if is_dataclass(kind) else None
    for name in map(str, node):
        key = f"{prefix}{name}"
        if known is not None and name not in known:
            if foreign := explain_foreign_name(key, str(node[name])):
                raise foreign
            near = [prefix + nearest for nearest in find_nearest(name, known)]
            raise ConfigError(
                f"{key}: no such key{format_suggestion(near)}",
                key=key, value=node[name], nearest=near,
            )  # fmt: skip
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
            check_known_keys(child, f"{key}.")


def check_sizes(cfg: DictConfig) -> None:
    """Refuses numbers that are too large for torch or the machine."""
    if cfg.seed >= SEED_LIMIT:
        raise ConfigError(
            f"seed={cfg.seed}: must be less than 2**64 = {SEED_LIMIT}.", key="seed", value=cfg.seed
        )
    for key, value in flatten_config(OmegaConf.to_container(cfg, resolve=True)).items():  # type: ignore[arg-type]
        whole = isinstance(value, int) and not key.endswith("seed")
        if whole and abs(value) > INT32_MAX:
            raise ConfigError(f"{key}={value}: must be at most {INT32_MAX}.", key=key, value=value)
    for keys in (("batch_size", "num_generation"), ("eval.samples",), ("curriculum.samples",)):
        factors = {key: OmegaConf.select(cfg, key) for key in (*keys, "max_new_tokens")}
        if math.prod(factors.values()) > INT32_MAX:
            given = " ".join(f"{key}={value}" for key, value in factors.items())
            raise ConfigError(
                f"{given}: that is up to {math.prod(factors.values())} tokens at once, and more "
                f"than {INT32_MAX} can't be held; lower one of them."
            )


def check_metric(cfg: DictConfig, metric: str, key: str) -> None:
    """Refuses a metric that no run logs."""
    rewards = [f"reward/{name}" for name in (*REWARD_METRICS, *cfg.reward)]
    known = [*EVAL_METRICS, "eval/overlap", *rewards, *STEP_METRICS]
    for source in cfg.dataset.get("sets") or ():
        known += [f"{name}{source}" for name in SOURCE_METRIC_PREFIXES]
    if cfg.kl.estimator == "full":
        known.append("kl/full")
    if metric.startswith("kl/") and (cfg.kl.estimator is None or not cfg.kl_weight):
        why = "kl=none" if cfg.kl.estimator is None else f"kl_weight={cfg.kl_weight}"
        raise ConfigError(f"{key}.{metric}: {why} has no reference, so no run logs this.")
    if metric not in known:
        near = find_nearest(metric, known)
        raise ConfigError(
            f"{key}.{metric}: no run logs this{format_suggestion(near)}",
            key=key, value=metric, choices=known, nearest=near,
        )  # fmt: skip


def check_training(cfg: DictConfig) -> None:
    """Checks what concerns training only: in evaluation, `checkpoint` is a folder."""
    if not isinstance(cfg.checkpoint, DictConfig):
        raise ConfigError(
            f"checkpoint={cfg.checkpoint}: that is for grpo eval checkpoint=DIR.",
            key="checkpoint",
            value=cfg.checkpoint,
        )
    if not (cfg.eval.greedy and cfg.eval.samples):
        raise ConfigError(
            f"eval.samples={cfg.eval.samples} eval.greedy={cfg.eval.greedy}: training is followed "
            f"by both; leaving one out is for grpo eval."
        )
    check_trained_model(cfg.model)
    check_at_least(cfg, "checkpoint.every", 0, whole=True)
    check_at_least(cfg, "checkpoint.keep", 1, whole=True)
    betas = list(cfg.optim.betas)
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(
            f"optim.betas={betas}: needs two numbers from 0 up to, not with, 1.",
            key="optim.betas",
            value=betas,
        )


def check_model(model: DictConfig) -> None:
    given = [f"model.{k}={model[k]}" for k in ("id", "path", "packaged") if model[k] is not None]
    if len(given) != 1:
        raise ConfigError(
            f"model={model.name}: give exactly one of model.id=ORG/NAME (on the hub) and "
            f"model.path=FOLDER, not {' and '.join(given) or 'none'}.",
            key="model",
            value=model.name,
        )
    check_revision("model.revision", model.revision)


def check_trained_model(model: DictConfig) -> None:
    """Refuses keys that don't apply to the chosen model; `grpo eval` has another model."""
    if model.revision is not None and model.id is None:
        raise ConfigError(
            f"model.revision={model.revision}: only a model on the hub has revisions, and "
            f"model={model.name} is none; leave it out, or give model.id=ORG/NAME.",
            key="model.revision",
            value=model.revision,
        )
    if model.trust_remote_code and model.packaged is not None:
        raise ConfigError(
            f"model.trust_remote_code=true: model={model.name} is part of this package and brings "
            f"no code of its own; leave it out."
        )


def check_adapter(cfg: DictConfig) -> None:
    if cfg.adapter is not None:
        check_at_least(cfg, "adapter.rank", 1)
        check_positive(cfg, "adapter.alpha")
        target = cfg.adapter.target
        names = target if isinstance(target, ListConfig) else [target]
        if not names or not all(isinstance(name, str) for name in names):
            raise ConfigError(
                f"adapter.target={target}: should be all-linear, or the names of modules.",
                key="adapter.target",
                value=target,
            )


def check_installed(cfg: DictConfig) -> None:
    """Refuses choices that need an extra that is not installed."""
    for key, value in flatten_config(OmegaConf.to_container(cfg)).items():  # type: ignore[arg-type]
        if key.endswith("_target_") and value in EXTRA_OF_TARGET:
            require_extra(*EXTRA_OF_TARGET[value])
    if OmegaConf.select(cfg, "adapter.quantized"):
        require_extra("adapter.quantized=True", "bitsandbytes", "quantized")
    if cfg.optim.name == "adamw_8bit":
        require_extra("optim.name=adamw_8bit", "bitsandbytes", "quantized")


def check_curriculum(cfg: DictConfig) -> None:
    curriculum = cfg.curriculum
    check_choice(cfg, "curriculum.order", ("shuffled", "given", "easy_first", "hard_first"))
    check_at_least(cfg, "curriculum.samples", 0)
    low, high = curriculum.at_least, curriculum.at_most
    if not 0 <= low <= high <= 1:
        raise ConfigError(
            f"curriculum.at_least={low} at_most={high}: shares from 0 to 1, the lower one first."
        )
    asks = curriculum.order in ("easy_first", "hard_first") or (low, high) != (0, 1)
    if asks and not curriculum.samples:
        raise ConfigError(
            f"curriculum.samples=0: order={curriculum.order} at_least={low} at_most={high} need "
            f"to know how hard each prompt is; set curriculum.samples=4."
        )
    if curriculum.order != "shuffled" and "sets" in cfg.dataset:
        raise ConfigError(
            f"curriculum.order={curriculum.order}: a mix is drawn at random; use shuffled.",
            key="curriculum.order",
            value=curriculum.order,
        )


def check_rewards(reward: DictConfig) -> None:
    if not reward:
        raise ConfigError("reward: there is none; choose reward=answer or name a callable.")
    for name, part in ((str(name), part) for name, part in reward.items()):
        if name in REWARD_METRICS:
            raise ConfigError(f"reward.{name}: this name is taken by the metric reward/{name}.")
        if not isinstance(part, DictConfig) or "_target_" not in part:
            raise ConfigError(
                f"reward.{name}: needs _target_, the callable to use: add "
                f"+reward.{name}._target_=my_module.my_reward",
                key=f"reward.{name}",
            )
        weight = part.get("weight", 1.0)
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            key = f"reward.{name}.weight"
            raise ConfigError(f"{key}={weight}: should be a number.", key=key, value=weight)
