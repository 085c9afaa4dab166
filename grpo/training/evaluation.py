"""How good the policy is on rows it is not trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb, fsum

from grpo.data.answers import normalize_answer
from grpo.rewards import WeightedReward, compute_scores
from grpo.rewards.scoring import find_right, raise_if_all_failed, to_samples
from grpo.rollout import Engine
from grpo.types import Example, Prompt, Rollout, Sampling, Scores
from grpo.verifiers.numbers import Number

EVALUATION_SEED = (
    0  # of the sampled completions: the same for every evaluation, so that they compare
)


@dataclass(frozen=True)
class ScoredRollout:
    """Completions of the evaluation prompts, and what was said of them."""

    rollout: Rollout
    scores: Scores


@dataclass(frozen=True)
class Evaluation:
    """A fixed set of prompts and how they are answered."""

    engine: Engine
    prompts: Sequence[Prompt]
    rewards: Mapping[str, WeightedReward]
    samples: int  # completions a prompt for the sampled figures; 0: none
    greedy: bool  # also the one that the policy thinks likeliest
    sampling: Sampling
    overlap: float = 0.0  # the share of its questions that are trained on

    @property
    def answer_counts(self) -> dict[str, int]:
        """Of each metric that is a share of right answers: of how many answers."""
        counts = Counter(prompt.example.source for prompt in self.prompts)
        found = {}
        for kind, each in (("accuracy", 1), ("sampled_accuracy", self.samples)):
            found[f"eval/{kind}"] = each * len(self.prompts)
            found |= {f"eval/{kind}_from_{own}": each * n for own, n in counts.items() if own}
        return {**found, "eval/pass_at_k": len(self.prompts)}

    def evaluate(self) -> tuple[ScoredRollout | None, ScoredRollout | None]:
        """Greedy and sampled completions, scored."""
        greedy = self._sample_and_score(1, self.sampling.as_greedy()) if self.greedy else None
        return greedy, self._sample_and_score(self.samples, self.sampling) if self.samples else None

    def _sample_and_score(self, count: int, sampling: Sampling) -> ScoredRollout:
        rollout = self.engine.generate(self.prompts, count, sampling, EVALUATION_SEED)
        answers = ScoredRollout(rollout, compute_scores(rollout, self.rewards))
        raise_if_all_failed(rollout, answers.scores)
        return answers


def evaluation_metrics(
    greedy: ScoredRollout | None, sampled: ScoredRollout | None
) -> dict[str, float]:
    """The figures of an evaluation under their names in every sink."""
    return {
        **greedy_metrics(greedy),
        **sampled_metrics(sampled),
        **accuracy_by_source(greedy, sampled),
    }


def greedy_metrics(answers: ScoredRollout | None) -> dict[str, float]:
    """Reward, accuracy and length of the likeliest completion."""
    if answers is None:
        return {}
    return {
        "eval/reward": float(answers.scores.total_BG.nanmean()),
        "eval/accuracy": float(answers.scores.right_BG.float().mean()),
        "eval/length_mean": float(answers.rollout.lengths_N.float().mean()),
    }


def sampled_metrics(answers: ScoredRollout | None) -> dict[str, float]:
    """Accuracy of all samples, and pass@k with k = all of them."""
    if answers is None:
        return {}
    right_BG = answers.scores.right_BG
    return {
        "eval/sampled_accuracy": float(right_BG.float().mean()),
        "eval/pass_at_k": float(right_BG.any(dim=1).float().mean()),
    }


def accuracy_by_source(
    greedy: ScoredRollout | None, sampled: ScoredRollout | None
) -> dict[str, float]:
    """The accuracies of each set of a mix."""
    found = {}
    for kind, answers in (("accuracy", greedy), ("sampled_accuracy", sampled)):
        if answers is None:
            continue
        for source in sorted(set(answers.scores.sources) - {""}):
            rows = [b for b, own in enumerate(answers.scores.sources) if own == source]
            right_BG = answers.scores.right_BG[rows]
            found[f"eval/{kind}_from_{source}"] = float(right_BG.float().mean())
    return found


def summarize_evaluation(
    greedy: ScoredRollout | None, sampled: ScoredRollout | None
) -> dict[str, dict[str, float]]:
    """Everything that is said of all rows, and of those of each set of a mix.

    The number of prompts; accuracy as the data set's verifier reads it, and leniently; pass@1,
    pass@2, … and the majority's accuracy.
    """
    either = greedy or sampled
    assert either is not None  # config.check saw to it
    sources = either.scores.sources
    groups = {"all": list(range(len(sources)))}
    for source in sorted(set(sources) - {""}):
        groups[source] = [b for b, own in enumerate(sources) if own == source]
    return {name: compute_accuracies(greedy, sampled, rows) for name, rows in groups.items()}


def compute_accuracies(
    greedy: ScoredRollout | None, sampled: ScoredRollout | None, rows: Sequence[int]
) -> dict[str, float]:
    found: dict[str, float] = {"prompts": len(rows)}
    if greedy is not None:
        found["greedy"] = mean([float(greedy.scores.right_BG[b, 0]) for b in rows])
        lenient = verify_leniently_BG(greedy.rollout)
        found["greedy lenient"] = mean([lenient[b][0] for b in rows])
    if sampled is not None:
        right_BG, count = sampled.scores.right_BG, sampled.rollout.num_generation
        found["sampled"] = mean([float(right_BG[b].float().mean()) for b in rows])
        lenient = verify_leniently_BG(sampled.rollout)
        found["sampled lenient"] = mean([mean(lenient[b]) for b in rows])
        for k in powers_of_two(count):
            right_B = [int(right_BG[b].sum()) for b in rows]
            found[f"pass@{k}"] = mean([pass_at_k(count, right, k) for right in right_B])
        found[f"majority@{count}"] = mean([majority_accuracy(sampled, b) for b in rows])
    return found


def powers_of_two(count: int) -> list[int]:
    """1, 2, 4 … up to a count, and the count itself."""
    return sorted({2**n for n in range(count.bit_length()) if 2**n <= count} | {count})


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that one of k samples is right, unbiased: Chen et al. (2107.03374), eq. 1."""
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def majority_accuracy(answers: ScoredRollout, b: int) -> float:
    """Whether the answer given most often is right; several as often share the point."""
    example = answers.rollout.prompts[b].example
    size = answers.rollout.num_generation
    texts = answers.rollout.texts[b * size : (b + 1) * size]
    votes: Counter[Number | str] = Counter()
    right: dict[Number | str, bool] = {}
    for text, is_right in zip(texts, answers.scores.right_BG[b].tolist(), strict=True):
        ballot = read_vote(example, text)
        if ballot is not None:
            votes[ballot] += 1
            right[ballot] = right.get(ballot, False) or is_right
    most = max(votes.values(), default=0)
    return mean([float(right[ballot]) for ballot, count in votes.items() if count == most])


def read_vote(example: Example, text: str) -> Number | str | None:
    """What a completion's answer is counted by; None where there is none."""
    answer = example.extract_answer(text)
    return None if answer is None else normalize_answer(answer)


def verify_leniently_BG(rollout: Rollout) -> list[list[float]]:
    """What the verifier says where it takes an answer wherever it stands; else what it says."""
    size = rollout.num_generation
    verdicts = [float(own) for own in find_right(to_samples(rollout), leniently=True)]
    return [verdicts[start : start + size] for start in range(0, len(verdicts), size)]


def mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values) if values else 0.0
