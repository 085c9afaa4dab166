"""What the metrics of a step's updates are made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

import torch
from torch import Tensor

from grpo.models.head import TokenScores
from grpo.training.loss import (
    LOGGED_ESTIMATORS,
    MicroBatchLoss,
    Objective,
)
from grpo.types import Rollout


@dataclass(frozen=True)
class UpdateResult:
    """What an update was made of."""

    metrics: dict[str, float]
    ratios_T: Tensor  # of every completion token, as often as it was read, on the CPU
    log_ratio_NC: Tensor | None  # policy to reference before the first update, on the CPU


class UpdateTotals:
    """Sums over a step's completion tokens and updates, made into means at the end.

    They stay on the device, in fp32, until then, so that nothing waits for it.
    """

    def __init__(self, objective: Objective, rollout: Rollout) -> None:
        self.objective = objective
        self.token_sums: dict[str, list[Tensor]] = defaultdict(list)  # sums over tokens
        self.losses: dict[str, list[Tensor]] = defaultdict(list)
        self.tokens: list[Tensor] = []
        self.ratios: list[Tensor] = []
        self.importance: list[Tensor] = []
        self.optimizer_metrics: list[dict[str, float]] = []  # what the optimizer said of each
        self.log_ratio_NC = torch.full_like(rollout.logprobs_NC, torch.nan)

    @torch.no_grad()
    def add(self, rows: Tensor, loss: MicroBatchLoss, mask_NC: Tensor, scored: TokenScores) -> None:
        """Takes in what was read of these rows."""
        self.tokens.append(mask_NC.sum())
        self.losses["loss/total"].append(loss.total.detach())
        self.losses["loss/policy"].append(loss.policy.detach())
        self.losses["loss/kl"].append(loss.kl.detach())
        if self.objective.entropy_weight > 0:
            self.losses["loss/entropy"].append(loss.entropy.detach())
        self.ratios.append(loss.ratio_NC[mask_NC])
        self.importance.append(loss.importance_NC[mask_NC])
        self._add_sum("policy/entropy", scored.entropy[mask_NC])
        self._add_sum("policy/clip_fraction", loss.clipped_NC[mask_NC].float())
        if loss.kl_NC is None or loss.reference_NC is None:
            return
        self._add_sum("kl/mean", loss.kl_NC[mask_NC])
        plain_T, reference_T = scored.plain_logprobs[mask_NC], loss.reference_NC[mask_NC]
        for name, estimator in LOGGED_ESTIMATORS.items():
            self._add_sum(f"kl/{name}", estimator(plain_T, reference_T))
        if self.objective.readout.divergence is not None:
            self._add_sum("kl/full", scored.divergence[mask_NC])
        self.log_ratio_NC[rows, : mask_NC.shape[1]] = scored.plain_logprobs - loss.reference_NC

    def _add_sum(self, name: str, values_T: Tensor) -> None:
        self.token_sums[name].append(values_T.sum())

    def merge(self, others: UpdateTotals) -> None:
        """Those of a minibatch; what was said of a row before its first update stays."""
        self.tokens += others.tokens
        self.ratios += others.ratios
        self.importance += others.importance
        for own, more in ((self.token_sums, others.token_sums), (self.losses, others.losses)):
            for name, values in more.items():
                own[name] += values
        unread_NC = self.log_ratio_NC.isnan()
        self.log_ratio_NC = torch.where(unread_NC, others.log_ratio_NC, self.log_ratio_NC)

    def compute_result(self) -> UpdateResult:
        """Means over tokens, and over updates; the largest ratio of all."""
        steps, ratios_T = len(self.optimizer_metrics), torch.cat(self.ratios).cpu()
        tokens, log_T = fetch_sum(self.tokens), torch.cat(self.importance).cpu()
        metrics = {
            **{name: fetch_sum(values) / steps for name, values in self.losses.items()},
            **{name: fetch_sum(values) / tokens for name, values in self.token_sums.items()},
            "policy/ratio_max": float(ratios_T.max()),
            "sampler/kl": float((log_T.expm1() - log_T).mean()),  # k3: sampler to policy
            "sampler/importance_min": float(log_T.min().exp()),
            "sampler/importance_max": float(log_T.max().exp()),
            **{
                name: sum(u[name] for u in self.optimizer_metrics) / steps
                for name in self.optimizer_metrics[0]
            },
        }
        has_reference = "kl/mean" in self.token_sums
        return UpdateResult(metrics, ratios_T, self.log_ratio_NC.cpu() if has_reference else None)


def fetch_sum(parts: Sequence[Tensor]) -> float:
    """The sum of numbers that are on a device, fetched together."""
    return fsum(torch.stack(list(parts)).tolist())
