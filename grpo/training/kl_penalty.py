"""The KL penalty: scores under the reference, the weight, and updates of the reference."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from grpo.errors import ConfigError
from grpo.memory.budget import TokenLimit
from grpo.memory.microbatch import score_rollout
from grpo.models.head import Readout
from grpo.models.load import LanguageModel
from grpo.models.reference import Reference
from grpo.objective import AdaptiveWeight
from grpo.parallel import ONE_RANK, Ranks
from grpo.training.loss import KLTerm
from grpo.types import Rollout, Sampling


class ReferenceScores(NamedTuple):
    """What a step's loss or rewards need from the reference."""

    reference_NC: Tensor | None  # its log-probabilities; None: no KL, or the update computes it
    divergence_BG: Tensor | None  # summed over tokens, to subtract from the reward, else None
    weight: float  # of the KL, in the loss or in the reward


class NoKL:
    """Training without a KL term: no reference, no cost. Also the interface of `KLPenalty`."""

    reference: Reference | None = None

    def score(self, rollout: Rollout) -> ReferenceScores:
        """Scores a rollout under the reference; the loop calls it before the advantages."""
        return ReferenceScores(None, None, 0.0)

    def after_update(
        self, step: int, metrics: dict[str, float], completions: int
    ) -> dict[str, float]:
        """Adapts weight and reference after a step's updates; returns the weight it used."""
        return {}

    def state(self) -> dict[str, Any]:
        """Returns what a resumed run needs to continue with the same numbers."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""


class KLPenalty(NoKL):
    """A KL term with its reference and its weight."""

    def __init__(
        self,
        policy: LanguageModel,
        reference: Reference,
        term: KLTerm,
        weight: AdaptiveWeight,
        sampling: Sampling,
        limit: TokenLimit,
        sync_every: int,
        sync_share: float,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        """
        Args:
            sync_every: steps between two updates of the reference; 0: it never changes.
            sync_share: how far each update moves its weights toward the policy's; 1: all the way.
        """
        self.policy, self.term, self.weight = policy, term, weight
        self.reference: Reference = reference
        self.sampling, self.limit = sampling, limit
        self.sync_every, self.sync_share, self.ranks = sync_every, sync_share, ranks
        self.reference_moved = False  # the reference is not the initial model any more
        self.policy_is_reference = True  # the policy still equals the reference

    def score(self, rollout: Rollout) -> ReferenceScores:
        if not self.term.in_reward:
            # For an exact divergence, the update runs both models side by side.
            exact = self.term.divergence is not None
            reference_NC = None if exact else self._score_reference(rollout)
            return ReferenceScores(reference_NC, None, self.weight.weight)
        reference_NC, divergence_NC = self._score_divergence(rollout)
        total_N = (divergence_NC * rollout.mask_NC).sum(dim=1)
        divergence_BG = total_N.view(-1, rollout.num_generation)
        return ReferenceScores(reference_NC, divergence_BG, self.weight.weight)

    def _score_reference(self, rollout: Rollout) -> Tensor:
        """Returns [N, C] the reference's log-probabilities; the sampler's while both are equal."""
        if (
            self.policy_is_reference
            and rollout.exact_logprobs
            and not self.sampling.alters_distribution
        ):
            return rollout.logprobs_NC
        plain = Readout(Sampling(self.sampling.temperature))
        with self.reference.activated():
            return score_rollout(
                self.reference.model, rollout, plain, self.limit, ranks=self.ranks
            ).plain_logprobs

    def _score_divergence(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Returns [N, C] the reference's log-probabilities and the divergence before the update."""
        if (
            self.term.estimator is not None
            and rollout.exact_logprobs
            and not self.sampling.alters_distribution
        ):
            reference_NC = self._score_reference(rollout)
            return reference_NC, self.term.estimator(rollout.logprobs_NC, reference_NC)
        readout = Readout(self.sampling, divergence=self.term.divergence)
        scored = score_rollout(
            self.policy, rollout, readout, self.limit, self.reference, ranks=self.ranks
        )
        exact = self.term.divergence is not None
        reference_NC = scored.reference if exact else self._score_reference(rollout)
        return reference_NC, self.term.token_kl(scored, reference_NC)

    def after_update(
        self, step: int, metrics: dict[str, float], completions: int
    ) -> dict[str, float]:
        weight = self.weight.weight
        self.weight.observe(metrics["kl/mean"], completions)
        self.policy_is_reference = False
        if self.sync_every and step % self.sync_every == 0:
            self.reference.move(self.sync_share)
            self.reference_moved, self.policy_is_reference = True, self.sync_share == 1
        return {"kl/weight": weight}

    def state(self) -> dict[str, Any]:
        moved = {"reference": self.reference.state()} if self.reference_moved else {}
        return {"weight": self.weight.weight, "same": self.policy_is_reference, **moved}

    def load_state(self, state: dict[str, Any]) -> None:
        self.policy_is_reference = state.get("same", False)
        if self.weight.target is not None:
            self.weight.weight = state.get("weight", self.weight.weight)
        if "reference" not in state:
            return
        if not self.reference.weight_pairs:
            raise ConfigError(
                f"kl.sync_every={self.sync_every}: this run's reference has moved, so it needs "
                f"weights of its own; keep kl.sync_every above 0.",
                key="kl.sync_every",
                value=self.sync_every,
            )
        self.reference.load_state(state["reference"])
        self.reference_moved = True
