"""Named diagnoses from the metrics alone: evidence, likely cause, and the override to try.

docs/doctor.md explains them and their limits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, NamedTuple

from grpo.config.schema import DoctorConfig
from grpo.doctor.history import MetricsLine, RunHistory


class Finding(NamedTuple):
    """The text of one diagnosis."""

    evidence: str
    cause: str
    remedy: str  # overrides to try


@dataclass(frozen=True)
class Diagnosis:
    """Something that is wrong with a run, or keeps it from learning."""

    name: str
    title: str
    evidence: str
    cause: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.title}: {self.evidence} {self.cause} Try: {self.remedy}"


def format_kl_override(history: RunHistory, algorithm: str) -> str:
    """Returns the overrides for an algorithm without a KL that keep the run's kl_weight."""
    return f"algorithm={algorithm} kl_weight={history.config['kl_weight']:g}"


def no_reward(history: RunHistory) -> Finding | None:
    steps = history.steps
    unsolved, agree = history.values("reward/unsolved_groups"), "reward/zero_variance_groups"
    if min(unsolved, default=0.0) < 1 or min(history.values(agree), default=0.0) < 1:
        return None
    each = history.config["batch_size"] * history.config["num_generation"]
    cut = history.recent_mean("completion/truncated") or 0.0
    unread = 1 - (history.recent_mean("completion/answered") or 0.0)
    most = history.config["max_new_tokens"]
    evidence = (
        f"{len(steps) * each} completions in {len(steps)} steps, and not one is right; "
        f"{cut:.0%} were cut off at max_new_tokens={most}, {unread:.0%} hold no answer that can "
        f"be read."
    )
    if cut > 0.5:
        cause = "They are cut off before the answer."
        return Finding(evidence, cause, f"max_new_tokens={2 * most}")
    if unread > 0.5:
        return Finding(
            evidence,
            "The model doesn't write the format that the reward reads.",
            "reward=answer_format, or dataset.system_prompt and dataset.worked_examples to show it",
        )
    return Finding(
        evidence,
        "The task is too hard for this model, or the reward is wrong: read completions.jsonl.",
        "curriculum.samples=8 curriculum.at_least=0.1, or a larger model",
    )


def groups_agree(history: RunHistory) -> Finding | None:
    agreeing = history.recent_mean("reward/zero_variance_groups") or 0.0
    if agreeing < history.limits.agreeing_groups or no_reward(history):
        return None
    solved = history.recent_mean("reward/solved_groups") or 0.0
    evidence = (
        f"in {agreeing:.0%} of the groups all completions have the same reward; {solved:.0%} are "
        f"solved throughout."
    )
    if solved > 0.5:
        return Finding(
            evidence,
            "The prompts are too easy by now, so there is nothing left to learn from them.",
            "curriculum.samples=8 curriculum.at_most=0.9, or harder rows",
        )
    return Finding(
        evidence,
        "A group with equal rewards trains nothing.",
        f"num_generation={2 * history.config['num_generation']} algorithm.resample=2",
    )


def kl_runs_away(history: RunHistory) -> Finding | None:
    # Not k3: a single token can make it large (docs/kl.md).
    name = "full" if history.recent_mean("kl/full") is not None else "k1"
    kl = history.recent_mean(f"kl/{name}")
    if kl is None or kl < history.limits.kl_high:
        return None
    weight, rate = history.config["kl_weight"], history.config["learning_rate"]
    return Finding(
        f"{kl:.3g} nats a token from the reference (kl/{name}, the last "
        f"{history.limits.window} steps).",
        "The policy moves away from the reference faster than kl_weight can hold it.",
        f"learning_rate={rate / 3:.2g}, or kl_weight={max(weight * 3, 0.01):.2g}",
    )


def entropy_collapses(history: RunHistory) -> Finding | None:
    change, solved = (
        history.first_and_last_means("policy/entropy"),
        history.recent_mean("reward/solved_groups") or 0.0,
    )
    if change is None or solved > 0.5:
        return None
    before, now = change
    if now > history.limits.entropy_low or now > before / 4:  # or it was low from the start
        return None
    rate = history.config["learning_rate"] / 3
    return Finding(
        f"{now:.2g} nats a token, {before:.2g} at the start; {solved:.0%} of the groups solved.",
        "The policy always answers the same, so the completions of a group don't differ.",
        f"learning_rate={rate:.2g} algorithm.entropy_weight=0.003, or "
        f"{format_kl_override(history, 'dapo')}",
    )


def lengths_explode(history: RunHistory) -> Finding | None:
    before, now = history.first_and_last_means("completion/truncated") or (0.0, 0.0)
    if now < history.limits.truncated_high or now < before + 0.2:
        return None
    tokens = history.config["max_new_tokens"]
    return Finding(
        f"{now:.0%} of the completions are cut off at max_new_tokens={tokens}, {before:.0%} at the "
        f"start.",
        "The reward favors length, or the averaging lets length dilute a mistake.",
        f"{format_kl_override(history, 'dr_grpo')}, reward=[answer,soft_overlong], or "
        f"max_new_tokens={tokens * 2}",
    )


def lengths_vanish(history: RunHistory) -> Finding | None:
    change = history.first_and_last_means("completion/length_mean")
    if change is None:
        return None
    before, now = change
    if now > history.limits.length_low * before:
        return None
    accuracy = [line["eval/sampled_accuracy"] for line in history.evaluations]
    if accuracy and accuracy[-1] > accuracy[0]:  # it found a shorter way to be right
        return None
    return Finding(
        f"{now:.1f} tokens a completion, {before:.1f} at the start, and no better accuracy.",
        "The policy loses least when it ends at once.",
        "a smaller weight of rewards for shortness, or a larger kl_weight",
    )


def reward_is_hacked(history: RunHistory) -> Finding | None:
    evaluations = history.evaluations
    rewards, spreads = (
        history.first_and_last_means("reward/mean"),
        history.first_and_last_means("reward/std"),
    )
    if len(evaluations) < 3 or rewards is None or spreads is None:
        return None
    start, now = rewards
    if now - start < 0.5 * max(spreads[0], 1e-6):
        return None
    metric = "eval/sampled_accuracy"
    first, last = evaluations[0].get(metric), evaluations[-1].get(metric)
    if first is None or last is None:
        return None
    lost = last <= first - history.limits.accuracy_lost
    if not lost and (last > first or last > history.limits.accuracy_low):
        return None
    return Finding(
        f"reward/mean went from {start:.3g} to {now:.3g}, {metric} from {first:.1%} to {last:.1%}.",
        "The policy gets the reward without solving the task.",
        "reward=answer beside your own, a smaller weight for yours, or a larger kl_weight; read "
        "completions.jsonl",
    )


def engine_differs(history: RunHistory) -> Finding | None:
    divergence = history.recent_mean("sampler/kl")
    if divergence is None or divergence < history.limits.mismatch_high:
        return None
    sampler = str(history.config["rollout"]["_target_"]).rpartition(".")[2]
    other = "" if sampler == "NativeEngine" else "rollout=native, or "
    return Finding(
        f"sampler/kl is {divergence:.3g} nats a token before any update, where it should be 0.",
        "The sampler and the update compute different probabilities.",
        f"{other}device.precision=fp32",
    )


def gradient_spikes(history: RunHistory) -> Finding | None:
    norms = [line.get("optim/grad_norm") for line in history.steps]
    spikes: list[float] = []
    for n in range(max(0, len(norms) - history.limits.window), len(norms)):
        norm, past = norms[n], [value for value in norms[:n] if value]
        if norm is None:
            spikes.append(float("inf"))
        elif len(past) >= 5 and norm > history.limits.spike * median(past):
            spikes.append(norm / median(past))
    if len(spikes) < history.limits.spikes:
        return None
    return Finding(
        f"{len(spikes)} of the last {history.limits.window} gradients were over "
        f"{history.limits.spike:g} times the median norm, up to {max(spikes):.0f} times.",
        "A few rewards or ratios are far larger than the rest.",
        "optim.max_grad_norm=0.2, rewards of one size, or algorithm.scale=group_std",
    )


def rate_rounds_away(history: RunHistory) -> Finding | None:
    moved = [
        line["optim/moved"]
        for line in history.steps[-history.limits.window :]
        if line.get("optim/moved") is not None and line.get("optim/grad_norm")
    ]
    if not moved or fmean(moved) >= history.limits.moved_low:
        return None
    rate = history.config["learning_rate"]
    return Finding(
        f"an update changes {fmean(moved):.0%} of the weights, though there is a gradient.",
        "The steps are smaller than the weights' last digit.",
        f"learning_rate={max(rate * 100, 1e-6):.2g}",
    )


def verifier_fails(history: RunHistory) -> Finding | None:
    failed = history.recent_mean("reward/failed")
    each = history.config["batch_size"] * history.config["num_generation"]
    if failed is None or failed / each <= history.limits.failed_high:
        return None
    return Finding(
        f"for {failed / each:.0%} of the completions a reward could not be computed; "
        f"completions.jsonl says why, under failed.",
        "A reward raises, runs out of time, or its endpoint doesn't answer.",
        "a longer timeout for that reward, or a fix of it",
    )


def evaluation_overlaps(history: RunHistory) -> Finding | None:
    shares = [line.get("eval/overlap") or 0.0 for line in history.evaluations]
    if max(shares, default=0.0) <= history.limits.overlap_high:
        return None
    return Finding(
        f"{max(shares):.0%} of the evaluation's questions are trained on.",
        "Its accuracy measures how well they are remembered.",
        "dataset.allow_overlap=false, or another dataset.eval_slice",
    )


KNOWN_AT_START = ("evaluation_overlaps",)  # known before the first step
DIAGNOSES: dict[str, tuple[str, Callable[[RunHistory], Finding | None]]] = {
    "evaluation_overlaps": ("the evaluation overlaps the training", evaluation_overlaps),
    "no_reward": ("no reward ever", no_reward),
    "groups_agree": ("all groups agree", groups_agree),
    "kl_runs_away": ("the KL runs away", kl_runs_away),
    "entropy_collapses": ("the entropy collapses", entropy_collapses),
    "lengths_explode": ("completions are cut off more and more", lengths_explode),
    "lengths_vanish": ("completions vanish", lengths_vanish),
    "reward_is_hacked": ("the reward rises and the accuracy doesn't", reward_is_hacked),
    "engine_differs": ("sampling and training disagree", engine_differs),
    "gradient_spikes": ("the gradients spike", gradient_spikes),
    "rate_rounds_away": ("the learning rate rounds away", rate_rounds_away),
    "verifier_fails": ("the verifier fails", verifier_fails),
}


def diagnose(
    lines: Sequence[MetricsLine], config: Mapping[str, Any], limits: DoctorConfig
) -> list[Diagnosis]:
    """Returns what is wrong with a run by its metrics.jsonl so far, in the order of DIAGNOSES."""
    history = RunHistory(lines, config, limits)
    early = len(history.steps) < limits.patience
    found = []
    for name, (title, find) in DIAGNOSES.items():
        finding = None if early and name not in KNOWN_AT_START else find(history)
        if finding is not None:
            found.append(Diagnosis(name, title, *finding))
    return found
