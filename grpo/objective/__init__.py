"""The math of GRPO: pure functions on tensors. A config names them; `build` binds their options."""

from grpo.objective.advantages import AGGREGATES, BASELINES, SCALES, Normalize
from grpo.objective.importance import OffPolicyCorrection
from grpo.objective.kl import DIVERGENCES, ESTIMATORS, AdaptiveWeight
from grpo.objective.losses import (
    PolicyLoss,
    clipped_surrogate,
    clipped_weight,
    gamma_weight,
    policy_gradient,
    sigmoid_gated,
)
from grpo.objective.ratios import RATIOS
from grpo.objective.weights import AVERAGINGS, Tokens, top_entropy_mask

__all__ = [
    "AGGREGATES",
    "AVERAGINGS",
    "BASELINES",
    "DIVERGENCES",
    "ESTIMATORS",
    "RATIOS",
    "SCALES",
    "AdaptiveWeight",
    "Normalize",
    "OffPolicyCorrection",
    "PolicyLoss",
    "Tokens",
    "clipped_surrogate",
    "clipped_weight",
    "gamma_weight",
    "policy_gradient",
    "sigmoid_gated",
    "top_entropy_mask",
]
