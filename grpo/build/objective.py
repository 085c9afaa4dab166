"""Builds objective, advantage, KL penalty and optimizer from a config."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from grpo.config.binding import bind, resolve_name, resolve_node
from grpo.config.overrides import parse_key
from grpo.errors import ConfigError
from grpo.memory.budget import Budget
from grpo.models.load import LanguageModel
from grpo.models.reference import make_reference
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
    OffPolicyCorrection,
)
from grpo.parallel import Ranks
from grpo.training.kl_penalty import KLPenalty, NoKL
from grpo.training.loss import KLTerm, Objective
from grpo.training.optimizer import SCHEDULES, Optimizer
from grpo.types import Sampling

log = logging.getLogger(__name__)


def build_sampling(cfg: DictConfig) -> Sampling:
    options = resolve_node(cfg.sampling)
    return Sampling(temperature=cfg.temperature, **options | {"stop": tuple(options["stop"])})


def build_objective(cfg: DictConfig) -> Objective:
    algorithm = cfg.algorithm
    return Objective(
        ratio=resolve_name(algorithm.ratio, RATIOS, "algorithm.ratio"),
        policy_loss=bind(algorithm.policy_loss, "algorithm.policy_loss"),
        averaging=resolve_name(algorithm.averaging, AVERAGINGS, "algorithm.averaging"),
        kl=build_kl_term(cfg),
        sampling=build_sampling(cfg),
        max_tokens=cfg.max_new_tokens,
        entropy_weight=algorithm.entropy_weight,
        mask_truncated=algorithm.mask_truncated,
        top_entropy=algorithm.top_entropy,
        correction=OffPolicyCorrection(
            level=RATIOS[algorithm.importance_level],
            low=algorithm.importance_floor,
            high=algorithm.importance_cap,
            outside=algorithm.importance_outside,
            max_sequence_kl=algorithm.max_sequence_kl,
        ),
        num_iterations=algorithm.num_iterations,
        minibatches=algorithm.minibatches,
    )


def build_advantage(cfg: DictConfig) -> Callable[..., Tensor]:
    """Builds the advantage: rewards [R, B, G], weights [R], optional penalty [B, G] -> [B, G].

    Raises:
        ConfigError: kl.within=reward, but a custom `algorithm.aggregate` takes no penalty_BG.
    """
    algorithm = cfg.algorithm
    normalize = Normalize(
        resolve_name(algorithm.baseline, BASELINES, "algorithm.baseline"),
        resolve_name(algorithm.scale, SCALES, "algorithm.scale"),
    )
    aggregate = resolve_name(algorithm.aggregate, AGGREGATES, "algorithm.aggregate")
    in_reward = cfg.kl.within == "reward" and cfg.kl_weight > 0
    if (
        in_reward
        and algorithm.aggregate not in AGGREGATES
        and not accepts_parameter(aggregate, "penalty_BG")
    ):
        raise ConfigError(
            f"algorithm.aggregate={algorithm.aggregate}: has no parameter penalty_BG for the KL "
            f"that kl.within=reward subtracts; add it, or use kl.within=loss.",
            key="algorithm.aggregate",
            value=algorithm.aggregate,
        )

    return functools.partial(aggregate, normalize=normalize)


def accepts_parameter(function: Callable[..., Any], parameter: str) -> bool:
    try:
        return parameter in inspect.signature(function).parameters
    except ValueError:  # a builtin without a signature
        return False


def build_kl_term(cfg: DictConfig) -> KLTerm | None:
    """Builds the KL term; None without a reference: kl=none, or kl_weight=0."""
    kl = cfg.kl
    if kl.estimator is None or cfg.kl_weight == 0:
        return None
    if kl.estimator == "k1" and kl.within == "loss" and not kl.unbiased_gradient:
        log.warning(
            "kl=k1 in the loss has a gradient of 0 on average, so it has no effect; "
            "use kl.unbiased_gradient=true or kl.within=reward (docs/kl.md)."
        )
    exact = kl.estimator == "full"
    table = {**ESTIMATORS[kl.direction], "full": None}
    return KLTerm(
        estimator=resolve_name(kl.estimator, table, "kl.estimator"),
        divergence=DIVERGENCES[kl.direction] if exact else None,
        in_reward=kl.within == "reward",
        unbiased_gradient=kl.unbiased_gradient,
    )


def describe_kl(cfg: DictConfig) -> dict[str, Any] | None:
    """Returns the keys of a run's KL; None if it has no KL."""
    if cfg.kl.estimator is None or cfg.kl_weight == 0:
        return None
    keys = ("estimator", "within", "target")
    return {"weight": cfg.kl_weight, **{key: cfg.kl[key] for key in keys}}


def format_kl(kl: Mapping[str, Any] | None) -> str:
    """Formats what `describe_kl` returns in words."""
    if kl is None:
        return "no KL"
    target = "" if kl["target"] is None else f", target {kl['target']:g}"
    return f"KL {kl['estimator']} of weight {kl['weight']:g} in the {kl['within']}{target}"


def warn_unused_kl(cfg: DictConfig, overrides: Sequence[str], choice: str) -> None:
    """Warns if these overrides or this choice of kl ask for a KL, but kl_weight is 0."""
    if unused := explain_unused_kl(cfg, overrides, choice):
        log.warning("%s", unused)


def explain_unused_kl(cfg: DictConfig, overrides: Sequence[str], choice: str) -> str | None:
    """Says why the KL asked for does nothing; None if it does, or none was asked for."""
    weight_is_set = not OmegaConf.is_interpolation(cfg, "kl_weight")
    if weight_is_set or cfg.kl_weight > 0 or cfg.kl.estimator is None:
        return None
    keys = [parse_key(override) for override in overrides]
    asked = [key for key in keys if key == "kl" or key.startswith("kl.")]
    if not asked and choice == "k3":
        return None
    return (
        f"{asked[0] if asked else f'kl={choice}'} is given, but this algorithm has no KL "
        f"(algorithm.kl_weight=0): none is computed and no reference is loaded; kl_weight=0.02, "
        f"for example, trains with it."
    )


def build_kl_penalty(
    cfg: DictConfig, policy: LanguageModel, objective: Objective, budget: Budget, ranks: Ranks
) -> NoKL:
    if objective.kl is None:
        return NoKL()
    return KLPenalty(
        policy,
        make_reference(policy, moves=cfg.kl.sync_every > 0),
        objective.kl,
        AdaptiveWeight(cfg.kl_weight, cfg.kl.target, cfg.kl.horizon),
        objective.sampling,
        budget.forward_limit,
        cfg.kl.sync_every,
        cfg.kl.sync_share,
        ranks,
    )


def count_updates_per_step(cfg: DictConfig) -> int:
    return int(cfg.algorithm.num_iterations * cfg.algorithm.minibatches)


def build_optimizer(cfg: DictConfig, policy: LanguageModel, steps: int) -> Optimizer:
    return Optimizer(
        policy.model,
        cfg.optim.name,
        learning_rate=cfg.learning_rate,
        # The schedule counts updates.
        total_steps=steps * count_updates_per_step(cfg),
        schedule=SCHEDULES[cfg.optim.schedule],
        warmup_steps=cfg.optim.warmup_steps,
        weight_decay=cfg.optim.weight_decay,
        betas=(cfg.optim.betas[0], cfg.optim.betas[1]),
        max_grad_norm=cfg.optim.max_grad_norm,
    )
