"""The metrics of a step's updates, summed over micro-batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any

import torch
from torch import Tensor

from grpo.models.head import TokenScores
from grpo.objective.importance import chi_squared, effective_share
from grpo.training.loss import (
    LOGGED_ESTIMATORS,
    MicroBatchLoss,
    Objective,
)
from grpo.types import Rollout


@dataclass(frozen=True)
class UpdateResult:
    """The metrics of a step's updates, and the values behind them."""

    metrics: dict[str, float]
    ratios_T: Tensor  # of every completion token, once per pass, on the CPU
    log_ratio_NC: Tensor | None  # log of policy / reference when first scored, on the CPU


class UpdateTotals:
    """Sums over a step's completion tokens and updates; `compute_result` turns them into means.

    The sums stay on the device, in fp32, until then, so that no step waits for the device.
    """

    def __init__(self, objective: Objective, rollout: Rollout) -> None:
        self.objective = objective
        self.token_sums: dict[str, list[Tensor]] = defaultdict(list)  # sums over tokens
        self.losses: dict[str, list[Tensor]] = defaultdict(list)
        self.tokens: list[Tensor] = []
        self.ratios: list[Tensor] = []
        self.importance: list[Tensor] = []
        self.optimizer_metrics: list[dict[str, float]] = []  # one for each optimizer step
        self.log_ratio_NC = torch.full_like(rollout.logprobs_NC, torch.nan)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what another rank needs: all but the objective, which it has."""
        return {**vars(self), "objective": None}

    @torch.no_grad()
    def add(self, rows: Tensor, loss: MicroBatchLoss, mask_NC: Tensor, scored: TokenScores) -> None:
        """Adds the loss and the scores of these rows."""
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
        self._add_sum("sampler/dropped", loss.dropped_NC[mask_NC].float())
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
        """Adds the totals of a minibatch; keeps the log-ratios of rows that were scored earlier."""
        self.tokens += others.tokens
        self.ratios += others.ratios
        self.importance += others.importance
        for sums, added in ((self.token_sums, others.token_sums), (self.losses, others.losses)):
            for name, values in added.items():
                sums[name] += values
        unscored_NC = self.log_ratio_NC.isnan()
        self.log_ratio_NC = torch.where(unscored_NC, others.log_ratio_NC, self.log_ratio_NC)

    def compute_result(self) -> UpdateResult:
        """Returns the means over tokens and over updates, and the largest ratio."""
        steps, ratios_T = len(self.optimizer_metrics), torch.cat(self.ratios).cpu()
        tokens, log_T = fetch_sum(self.tokens), torch.cat(self.importance).cpu()
        metrics = {
            **{name: fetch_sum(values) / steps for name, values in self.losses.items()},
            **{name: fetch_sum(values) / tokens for name, values in self.token_sums.items()},
            "policy/ratio_max": float(ratios_T.max()),
            "sampler/kl": float((log_T.expm1() - log_T).mean()),  # k3: sampler to policy
            "sampler/chi2": chi_squared(log_T),
            "sampler/effective_share": effective_share(log_T),
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
    """Returns the sum of scalars on a device, fetched in one transfer."""
    return fsum(torch.stack(list(parts)).tolist())
