"""The math of GRPO: pure functions on tensors. A config names them, `run` binds their options."""

from grpo.objective.advantages import group_advantages
from grpo.objective.kl import k1, k2, k3
from grpo.objective.losses import PolicyLoss, clipped_surrogate
from grpo.objective.weights import sequence_mean

__all__ = ["PolicyLoss", "clipped_surrogate", "group_advantages", "k1", "k2", "k3", "sequence_mean"]
