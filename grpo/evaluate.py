"""How good the policy is on rows it is not trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grpo.rewards import WeightedReward, score
from grpo.rollout import Engine
from grpo.types import Prompt, Sampling

SEED = 0  # of the sampled completions: the same for every evaluation, so that they compare


@dataclass(frozen=True)
class Evaluation:
    """A fixed set of prompts and how they are answered."""

    engine: Engine
    prompts: Sequence[Prompt]
    rewards: Mapping[str, WeightedReward]
    samples: int  # completions a prompt for the sampled figures
    sampling: Sampling

    def run(self) -> dict[str, float]:
        """Greedy reward, accuracy and length; sampled accuracy; pass@k with k = samples."""
        greedy = self.engine.generate(self.prompts, 1, self.sampling.greedy(), SEED)
        greedy_scores = score(greedy, self.rewards)
        sampled = self.engine.generate(self.prompts, self.samples, self.sampling, SEED)
        right_BG = score(sampled, self.rewards).right_BG
        return {
            "eval/reward": float(greedy_scores.total_BG.nanmean()),
            "eval/accuracy": float(greedy_scores.right_BG.float().mean()),
            "eval/sampled_accuracy": float(right_BG.float().mean()),
            "eval/pass_at_k": float(right_BG.any(dim=1).float().mean()),
            "eval/length_mean": float(greedy.lengths_N.float().mean()),
        }
