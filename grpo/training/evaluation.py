"""Evaluates the policy on rows that it is not trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, fsum

from grpo.data.answers import normalize_answer
from grpo.rewards.scoring import find_right, raise_if_all_failed, to_samples
from grpo.training.sampler import Sampler, ScoredRollout
from grpo.types import Example, Prompt, Rollout, Sampling
from grpo.verifiers.numbers import Number

EVALUATION_SEED = 0  # seeds the sampled completions of every evaluation, so that they compare


@dataclass(frozen=True)
class Evaluation:
    """A fixed set of prompts, and how to answer and score them."""

    sampler: Sampler
    prompts: Sequence[Prompt]
    samples: int  # completions a prompt for the sampled metrics; 0: none
    greedy: bool  # also evaluate one greedy completion a prompt
    sampling: Sampling
    overlap: float = 0.0  # the share of these questions that the run also trains on

    @property
    def answer_counts(self) -> dict[str, int]:
        """The number of answers behind each metric that is a share of right answers."""
        counts = Counter(prompt.example.source for prompt in self.prompts)
        answers = {}
        for kind, each in (("accuracy", 1), ("sampled_accuracy", self.samples)):
            answers[f"eval/{kind}"] = each * len(self.prompts)
            answers |= {f"eval/{kind}_from_{name}": each * n for name, n in counts.items() if name}
        return {**answers, "eval/pass_at_k": len(self.prompts)}

    def evaluate(self) -> tuple[ScoredRollout | None, ScoredRollout | None]:
        """Returns the scored greedy and sampled completions; None for a kind that is off."""
        greedy = self._sample_and_score(1, self.sampling.as_greedy()) if self.greedy else None
        return greedy, self._sample_and_score(self.samples, self.sampling) if self.samples else None

    def _sample_and_score(self, count: int, sampling: Sampling) -> ScoredRollout:
        answers = self.sampler.sample(self.prompts, count, sampling, EVALUATION_SEED)
        raise_if_all_failed(answers.rollout, answers.scores)
        return answers


def evaluation_metrics(
    greedy: ScoredRollout | None, sampled: ScoredRollout | None
) -> dict[str, float]:
    """Returns the metrics of an evaluation, under the names that every sink uses."""
    return {
        **greedy_metrics(greedy),
        **sampled_metrics(sampled),
        **accuracy_by_source(greedy, sampled),
    }


def greedy_metrics(answers: ScoredRollout | None) -> dict[str, float]:
    """Returns mean reward, accuracy and mean length of the greedy completions."""
    if answers is None:
        return {}
    return {
        "eval/reward": float(answers.scores.total_BG.nanmean()),
        "eval/accuracy": float(answers.scores.right_BG.float().mean()),
        "eval/length_mean": float(answers.rollout.lengths_N.float().mean()),
    }


def sampled_metrics(answers: ScoredRollout | None) -> dict[str, float]:
    """Returns the accuracy of all samples, and pass@k with k = the samples of a prompt."""
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
    """Returns the accuracies on each set of a mix."""
    accuracies = {}
    for kind, answers in (("accuracy", greedy), ("sampled_accuracy", sampled)):
        if answers is None:
            continue
        for source in sorted(set(answers.scores.sources) - {""}):
            rows = [b for b, name in enumerate(answers.scores.sources) if name == source]
            right_BG = answers.scores.right_BG[rows]
            accuracies[f"eval/{kind}_from_{source}"] = float(right_BG.float().mean())
    return accuracies


def summarize_evaluation(
    greedy: ScoredRollout | None, sampled: ScoredRollout | None
) -> dict[str, dict[str, float]]:
    """Returns the figures of all rows, and of the rows of each set of a mix.

    These are the number of prompts; accuracy by the data set's verifier, strict and lenient;
    pass@1, pass@2, pass@4, …; and the accuracy of the majority vote.
    """
    either = greedy or sampled
    assert either is not None  # check_config requires one of them
    sources = either.scores.sources
    groups = {"all": list(range(len(sources)))}
    for source in sorted(set(sources) - {""}):
        groups[source] = [b for b, name in enumerate(sources) if name == source]
    return {name: compute_accuracies(greedy, sampled, rows) for name, rows in groups.items()}


def compute_accuracies(
    greedy: ScoredRollout | None, sampled: ScoredRollout | None, rows: Sequence[int]
) -> dict[str, float]:
    figures: dict[str, float] = {"prompts": len(rows)}
    if greedy is not None:
        figures["greedy"] = mean([float(greedy.scores.right_BG[b, 0]) for b in rows])
        lenient = verify_leniently_BG(greedy.rollout)
        figures["greedy lenient"] = mean([lenient[b][0] for b in rows])
    if sampled is not None:
        right_BG, count = sampled.scores.right_BG, sampled.rollout.num_generation
        figures["sampled"] = mean([float(right_BG[b].float().mean()) for b in rows])
        lenient = verify_leniently_BG(sampled.rollout)
        figures["sampled lenient"] = mean([mean(lenient[b]) for b in rows])
        for k in powers_of_two(count):
            right_B = [int(right_BG[b].sum()) for b in rows]
            figures[f"pass@{k}"] = mean([pass_at_k(count, right, k) for right in right_B])
        figures[f"majority@{count}"] = mean([majority_accuracy(sampled, b) for b in rows])
    return figures


def powers_of_two(count: int) -> list[int]:
    """Returns 1, 2, 4, … up to a count, and the count itself."""
    return sorted({2**n for n in range(count.bit_length()) if 2**n <= count} | {count})


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Estimates the chance that one of k is right, unbiased: Chen et al. (2107.03374), eq. 1."""
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def majority_accuracy(answers: ScoredRollout, b: int) -> float:
    """Returns 1 if the most frequent answer is right, else 0; answers that tie share the point."""
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
    """Returns the normalized answer that a completion votes for; None if it has no answer."""
    answer = example.extract_answer(text)
    return None if answer is None else normalize_answer(answer)


def verify_leniently_BG(rollout: Rollout) -> list[list[float]]:
    """Returns 1 or 0 for each completion: right, if the answer may stand anywhere in it.

    Where a data set has no lenient verifier, its own verifier decides.

    Raises:
        RewardError: a verifier raised.
    """
    size = rollout.num_generation
    verdicts = [float(is_right) for is_right in find_right(to_samples(rollout), leniently=True)]
    return [verdicts[start : start + size] for start in range(0, len(verdicts), size)]


def mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values) if values else 0.0
