"""The metrics that runs log."""

from __future__ import annotations

EVAL_METRICS = (
    "eval/reward",
    "eval/accuracy",
    "eval/sampled_accuracy",
    "eval/pass_at_k",
    "eval/length_mean",
)

REWARD_METRICS = (
    "mean",
    "std",
    "failed",
    "solved_groups",
    "unsolved_groups",
    "zero_variance_groups",
    "resampled_groups",
)

STEP_METRICS = (
    *("loss/total", "loss/policy", "loss/kl", "kl/mean", "kl/k1", "kl/k2", "kl/k3"),
    *("kl/weight", "policy/entropy", "policy/clip_fraction", "policy/ratio_max"),
    *("sampler/kl", "sampler/chi2", "sampler/effective_share", "sampler/dropped"),
    *("sampler/importance_min", "sampler/importance_max"),
    *("completion/length_mean", "completion/length_max", "completion/truncated"),
    *("completion/answered", "optim/grad_norm", "optim/learning_rate", "optim/moved"),
    *("optim/skipped", "time/step", "time/rollout", "time/reward", "time/update"),
    *("perf/completion_tokens_per_second", "perf/samples_per_second", "memory/peak_gb"),
)

SOURCE_METRIC_PREFIXES = (
    "eval/accuracy_from_",
    "eval/sampled_accuracy_from_",
    "reward/from_",
)  # a mix's set
