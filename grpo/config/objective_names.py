"""The names in grpo.objective's tables, without torch, so that a wrong one is refused fast."""

from __future__ import annotations

BASELINE_NAMES = ("group_mean", "leave_one_out", "batch_mean", "none")
SCALE_NAMES = ("group_std", "batch_std", "informative_share", "none")
AGGREGATE_NAMES = ("sum_then_normalize", "normalize_then_sum")
RATIO_NAMES = ("token", "sequence", "sequence_product")
AVERAGING_NAMES = (
    "sequence_mean",
    "token_mean",
    "minibatch_token_mean",
    "constant",
    "sequence_sum",
)
ESTIMATOR_NAMES = ("k1", "k2", "k3", "full")
