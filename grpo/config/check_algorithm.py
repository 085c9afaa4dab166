"""Checks the keys of an algorithm, its KL and its sampling before anything starts."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from grpo.config.objective_names import (
    AGGREGATE_NAMES,
    AVERAGING_NAMES,
    BASELINE_NAMES,
    ESTIMATOR_NAMES,
    RATIO_NAMES,
    SCALE_NAMES,
)
from grpo.config.validation import (
    check_at_least,
    check_choice,
    check_function_name,
    check_positive,
)
from grpo.errors import ConfigError

FUNCTION_NAMES = {  # keys of an algorithm that name a function
    "baseline": BASELINE_NAMES,
    "scale": SCALE_NAMES,
    "aggregate": AGGREGATE_NAMES,
    "ratio": RATIO_NAMES,
    "averaging": AVERAGING_NAMES,
}


def check_sampling(cfg: DictConfig) -> None:
    check_positive(cfg, "sampling.repetition_penalty")
    check_positive(cfg, "sampling.top_p", maximum=1.0)
    for key in ("sampling.top_k", "sampling.min_p"):
        check_at_least(cfg, key, 0)
    if cfg.sampling.min_p > 1:
        raise ConfigError(
            f"sampling.min_p={cfg.sampling.min_p}: must be at most 1.",
            key="sampling.min_p",
            value=cfg.sampling.min_p,
        )
    if "" in cfg.sampling.stop:
        raise ConfigError(
            "sampling.stop: an empty text would end every completion at once.", key="sampling.stop"
        )


def check_algorithm(cfg: DictConfig) -> None:
    for key in ("algorithm.num_iterations", "algorithm.minibatches"):
        check_at_least(cfg, key, 1)
    for key in ("algorithm.resample", "algorithm.entropy_weight"):
        check_at_least(cfg, key, 0)
    check_positive(cfg, "algorithm.top_entropy", maximum=1.0)
    check_at_least(cfg, "algorithm.importance_cap", 1.0)
    check_at_least(cfg, "algorithm.importance_floor", 0.0)
    check_choice(cfg, "algorithm.importance_outside", ("truncate", "mask"))
    check_choice(cfg, "algorithm.importance_level", RATIO_NAMES)
    if cfg.algorithm.max_sequence_kl is not None:
        check_positive(cfg, "algorithm.max_sequence_kl")
    algorithm = cfg.algorithm
    if algorithm.importance_floor > 1:
        raise ConfigError(
            f"algorithm.importance_floor={algorithm.importance_floor}: must be at most 1, the "
            f"weight of what the policy itself has sampled.",
            key="algorithm.importance_floor",
            value=algorithm.importance_floor,
        )
    for key, names in FUNCTION_NAMES.items():
        check_function_name(algorithm[key], names, f"algorithm.{key}")
    if algorithm.minibatches > cfg.batch_size:
        raise ConfigError(
            f"algorithm.minibatches={algorithm.minibatches}: a minibatch holds whole groups, and "
            f"batch_size={cfg.batch_size} is all there are.",
            key="algorithm.minibatches",
            value=algorithm.minibatches,
        )
    by_group = (
        ("baseline", ("group_mean", "leave_one_out")),
        ("scale", ("group_std", "informative_share")),
    )
    for key, needs in by_group:
        if algorithm[key] in needs and cfg.num_generation < 2:
            raise ConfigError(
                f"num_generation={cfg.num_generation}: algorithm.{key}={algorithm[key]} compares "
                f"the completions of a prompt, so it needs at least 2.",
                key="num_generation",
                value=cfg.num_generation,
            )
    if algorithm.resample and algorithm.baseline in ("batch_mean", "none"):
        raise ConfigError(
            f"algorithm.resample={algorithm.resample}: a group whose rewards agree still teaches "
            f"something with algorithm.baseline={algorithm.baseline}; use 0.",
            key="algorithm.resample",
            value=algorithm.resample,
        )
    check_policy_loss(cfg)


def check_policy_loss(cfg: DictConfig) -> None:
    """Checks the ranges of this package's losses; their types are checked by `bind`."""
    loss = cfg.algorithm.policy_loss
    for name in ("clip_low", "clip_high"):
        check_at_least(cfg, f"algorithm.policy_loss.{name}", 0.0, optional=True)
    for name in ("ratio_max", "sharpness_positive", "sharpness_negative", "decay_positive"):
        if name in loss:
            check_positive(cfg, f"algorithm.policy_loss.{name}")
    dual = loss.get("clip_dual")
    if isinstance(dual, int | float) and dual <= 1 + loss.get("clip_high", 0.0):
        raise ConfigError(
            f"algorithm.policy_loss.clip_dual={dual}: must be more than 1 + clip_high = "
            f"{1 + loss.clip_high:g}, or it cuts off what is to be learnt.",
            key="algorithm.policy_loss.clip_dual",
            value=dual,
        )


def check_kl(cfg: DictConfig) -> None:
    check_choice(cfg, "kl.direction", ("reverse", "forward"))
    check_choice(cfg, "kl.within", ("loss", "reward"))
    check_at_least(cfg, "kl.sync_every", 0)
    check_positive(cfg, "kl.sync_share", maximum=1.0)
    kl = cfg.kl
    if kl.estimator is not None:
        check_function_name(kl.estimator, ESTIMATOR_NAMES, "kl.estimator")
    # Not so with kl_weight=0, which stands in many a sweep beside other weights.
    without = {"kl.within": "loss", "kl.unbiased_gradient": False, "kl.sync_every": 0}
    for key, value in without.items():
        if kl.estimator is None and OmegaConf.select(cfg, key) != value:
            raise ConfigError(
                f"{key}={OmegaConf.select(cfg, key)}: with kl=none there is no KL.",
                key=key,
                value=OmegaConf.select(cfg, key),
            )
    if kl.target is not None:
        check_positive(cfg, "kl.target")
        if cfg.kl_weight == 0 or kl.estimator is None:
            is_explicit = not OmegaConf.is_interpolation(cfg, "kl_weight") or kl.estimator is None
            raise ConfigError(
                f"kl.target={kl.target}: there is no KL to hold, with kl_weight={cfg.kl_weight:g} "
                f"and kl.estimator={kl.estimator}."
                + ("" if is_explicit else " This algorithm brings none; begin with kl_weight=0.02.")
            )
        if kl.horizon < cfg.batch_size * cfg.num_generation:
            raise ConfigError(
                f"kl.horizon={kl.horizon}: kl_weight would change by more than a fifth a step; use "
                f"at least batch_size x num_generation = {cfg.batch_size * cfg.num_generation}.",
                key="kl.horizon",
                value=kl.horizon,
            )
    if kl.unbiased_gradient and kl.within == "reward":
        raise ConfigError(
            "kl.unbiased_gradient=true: a KL in the reward has no gradient of its own; use "
            "kl.within=loss.",
            key="kl.unbiased_gradient",
            value="true",
        )
    if kl.unbiased_gradient and kl.estimator in ("k2", "full"):
        raise ConfigError(
            f"kl.unbiased_gradient=true: kl={kl.estimator} has the KL's gradient as it is; it is "
            f"for k1 and k3."
        )
