"""The pull toward the reference: how it is read, how strong it is, how the reference moves."""

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
from grpo.training.loss import KLTerm
from grpo.types import Rollout, Sampling


class ReferenceScores(NamedTuple):
    """What a step's completions are told of the reference."""

    reference_NC: Tensor | None  # its log-probabilities of their tokens; None: the update has them
    divergence_BG: Tensor | None  # summed over a completion's tokens, to be taken off its reward
    weight: float  # of the one or the other


class NoKL:
    """A KL term's part in the loop; this one is that of none: no reference, nothing computed."""

    reference: Reference | None = None

    def score(self, rollout: Rollout) -> ReferenceScores:
        """Before the advantages."""
        return ReferenceScores(None, None, 0.0)

    def after_update(
        self, step: int, metrics: dict[str, float], completions: int
    ) -> dict[str, float]:
        """After the update: moves weight and reference, and says how the weight stood."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same numbers."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from there."""


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
    ) -> None:
        """sync_every: steps between moves of the reference, 0: none; sync_share: of the way."""
        self.policy, self.term, self.weight = policy, term, weight
        self.reference: Reference = reference
        self.sampling, self.limit = sampling, limit
        self.sync_every, self.sync_share = sync_every, sync_share
        self.reference_moved = (
            False  # the reference is no longer the model that training began with
        )
        self.policy_is_reference = True  # the policy is still what the reference is

    def score(self, rollout: Rollout) -> ReferenceScores:
        if not self.term.in_reward:
            # For the exact divergence the update reads both side by side.
            exact = self.term.divergence is not None
            reference_NC = None if exact else self._score_reference(rollout)
            return ReferenceScores(reference_NC, None, self.weight.weight)
        reference_NC, divergence_NC = self._score_divergence(rollout)
        total_N = (divergence_NC * rollout.mask_NC).sum(dim=1)
        divergence_BG = total_N.view(-1, rollout.num_generation)
        return ReferenceScores(reference_NC, divergence_BG, self.weight.weight)

    def _score_reference(self, rollout: Rollout) -> Tensor:
        """[N, C] the reference's log-probabilities; the sampler's own while they are the same."""
        if (
            self.policy_is_reference
            and rollout.exact_logprobs
            and not self.sampling.alters_distribution
        ):
            return rollout.logprobs_NC
        plain = Readout(Sampling(self.sampling.temperature))
        with self.reference.activated():
            return score_rollout(self.reference.model, rollout, plain, self.limit).plain_logprobs

    def _score_divergence(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """[N, C] the reference's log-probabilities, and the divergence of the policy as it was."""
        if (
            self.term.estimator is not None
            and rollout.exact_logprobs
            and not self.sampling.alters_distribution
        ):
            reference_NC = self._score_reference(rollout)
            return reference_NC, self.term.estimator(rollout.logprobs_NC, reference_NC)
        readout = Readout(self.sampling, divergence=self.term.divergence)
        scored = score_rollout(self.policy, rollout, readout, self.limit, self.reference)
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
                f"kl.sync_every={self.sync_every}: this run's reference has moved, so its weights "
                f"are kept by themselves; keep kl.sync_every above 0.",
                key="kl.sync_every",
                value=self.sync_every,
            )
        self.reference.load_state(state["reference"])
        self.reference_moved = True
