"""One optimizer step from one rollout: loss and gradient in micro-batches that add up exactly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.models.forward import Completions
from grpo.models.head import TokenScores
from grpo.models.load import LanguageModel
from grpo.models.pad import pad_left
from grpo.objective import PolicyLoss, k1, k2, k3
from grpo.optim import Optimizer
from grpo.types import Rollout

KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}  # all logged, whichever is trained on


@dataclass(frozen=True)
class Objective:
    """What is minimised: sum over tokens of weight · (policy loss + kl_weight · KL)."""

    policy_loss: Callable[
        [Tensor, Tensor, Tensor], PolicyLoss
    ]  # logprobs, old logprobs, advantages
    weights: Callable[[Tensor], Tensor]  # mask [N, C] -> weights [N, C]
    kl: Callable[[Tensor, Tensor], Tensor] | None  # logprobs, reference logprobs
    kl_weight: float
    temperature: float


@dataclass(frozen=True)
class MicroBatch:
    """The same number of rows of each of some prompts: what one forward and backward holds."""

    prompts: list[int]  # indices into B
    rows: Tensor  # indices into N, in order


def micro_batches(rollout: Rollout, token_budget: int) -> Iterator[MicroBatch]:
    """Whole groups in length order up to the budget; a group over the budget is cut into rows.

    token_budget: prompt and completion tokens computed at once, padding counted.
    """
    group = rollout.num_generation
    prompt_lengths = [len(prompt.token_ids) for prompt in rollout.prompts]
    longest_B = rollout.lengths_N.view(-1, group).amax(dim=1).tolist()
    order = sorted(range(len(prompt_lengths)), key=lambda b: (longest_B[b], prompt_lengths[b]))

    def whole(prompts: list[int]) -> MicroBatch:
        rows = [torch.arange(b * group, (b + 1) * group) for b in prompts]
        return MicroBatch(prompts, torch.cat(rows))

    share: list[int] = []
    for b in order:
        width = max(prompt_lengths[i] for i in [*share, b])
        if share and (len(share) + 1) * (width + group * longest_B[b]) > token_budget:
            yield whole(share)
            share = []
        fitting = (token_budget - prompt_lengths[b]) // longest_B[b]
        if fitting >= group:
            share.append(b)
            continue
        for rows in torch.arange(b * group, (b + 1) * group).split(max(1, fitting)):
            yield MicroBatch([b], rows)
    if share:
        yield whole(share)


def completions(rollout: Rollout, batch: MicroBatch, policy: LanguageModel) -> Completions:
    """A micro-batch's tensors, cut to its own longest prompt and completion."""
    rows = batch.rows.to(rollout.tokens_NC.device)
    width = int(rollout.lengths_N[rows].max())
    prompts_BP, lengths_B = pad_left(
        [rollout.prompts[b].token_ids for b in batch.prompts], policy.pad_id, rows.device
    )
    return Completions(
        prompts_BP=prompts_BP,
        prompt_lengths_B=lengths_B,
        tokens_NC=rollout.tokens_NC[rows, :width],
        mask_NC=rollout.mask_NC[rows, :width],
    )


def update(
    policy: LanguageModel,
    reference: LanguageModel | None,
    optimizer: Optimizer,
    objective: Objective,
    rollout: Rollout,
    advantages_BG: Tensor,
    token_budget: int,
) -> dict[str, float]:
    """Takes one step on the policy and says what it was made of.

    The old log-probabilities are the sampler's, so `policy/ratio_max` shows any mismatch.
    """
    advantages_N = advantages_BG.reshape(-1).to(rollout.tokens_NC.device)
    weights_NC = objective.weights(rollout.mask_NC)
    totals = TokenTotals(rollout, objective)
    for batch in micro_batches(rollout, token_budget):
        inputs = completions(rollout, batch, policy)
        rows, width = batch.rows.to(advantages_N.device), inputs.tokens_NC.shape[1]
        old_NC = rollout.logprobs_NC[rows, :width]
        scored = policy.score(inputs, objective.temperature)
        policy_NC = objective.policy_loss(scored.logprobs, old_NC, advantages_N[rows])
        policy_loss = (weights_NC[rows, :width] * policy_NC.loss_NC).sum()
        kl_loss = torch.zeros_like(policy_loss)
        if reference is not None and objective.kl is not None:
            with torch.no_grad():
                reference_NC = reference.score(inputs, objective.temperature).logprobs
            kl_NC = objective.kl(scored.logprobs, reference_NC)
            kl_loss = objective.kl_weight * (weights_NC[rows, :width] * kl_NC).sum()
            totals.add_kl(inputs.mask_NC, scored.logprobs, reference_NC)
        (policy_loss + kl_loss).backward()
        totals.add(inputs.mask_NC, scored, old_NC, policy_NC.clipped_NC)
        totals.add_losses(policy_loss, kl_loss)
    return {**totals.metrics(), **optimizer.step()}


class TokenTotals:
    """Sums over a step's completion tokens, made into means at the end."""

    def __init__(self, rollout: Rollout, objective: Objective) -> None:
        self.tokens = int(rollout.lengths_N.sum())
        self.estimators = KL_ESTIMATORS | ({"mean": objective.kl} if objective.kl else {})
        self.policy_loss = self.kl_loss = 0.0
        self.sums: dict[str, float] = defaultdict(float)
        self.ratio_max = 0.0

    @torch.no_grad()
    def add(self, mask_NC: Tensor, scored: TokenScores, old_NC: Tensor, clipped_NC: Tensor) -> None:
        ratio_T = torch.exp(scored.logprobs[mask_NC] - old_NC[mask_NC])
        self.ratio_max = max(self.ratio_max, float(ratio_T.max()))
        self.sums["policy/entropy"] += float(scored.entropy[mask_NC].double().sum())
        self.sums["policy/clip_fraction"] += float(clipped_NC[mask_NC].sum())

    @torch.no_grad()
    def add_kl(self, mask_NC: Tensor, logprobs_NC: Tensor, reference_NC: Tensor) -> None:
        logprobs_T, reference_T = logprobs_NC[mask_NC].double(), reference_NC[mask_NC].double()
        for name, estimator in self.estimators.items():
            self.sums[f"kl/{name}"] += float(estimator(logprobs_T, reference_T).sum())

    def add_losses(self, policy_loss: Tensor, kl_loss: Tensor) -> None:
        self.policy_loss += float(policy_loss.detach())
        self.kl_loss += float(kl_loss.detach())

    def metrics(self) -> dict[str, float]:
        return {
            "loss/total": self.policy_loss + self.kl_loss,
            "loss/policy": self.policy_loss,
            "loss/kl": self.kl_loss,
            **{name: total / self.tokens for name, total in self.sums.items()},
            "policy/ratio_max": self.ratio_max,
        }
