"""Named diagnoses, each from the metrics alone: evidence, likely cause, and the override to try.

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
    """What one diagnosis has to say."""

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


def format_kl_override(course: RunHistory, algorithm: str) -> str:
    """The override for an algorithm that brings no KL, with the weight of the run's own."""
    return f"algorithm={algorithm} kl_weight={course.config['kl_weight']:g}"


def no_reward(course: RunHistory) -> Finding | None:
    steps = course.steps
    unsolved, agree = course.values("reward/unsolved_groups"), "reward/zero_variance_groups"
    if min(unsolved, default=0.0) < 1 or min(course.values(agree), default=0.0) < 1:
        return None
    each = course.config["batch_size"] * course.config["num_generation"]
    cut = course.recent_mean("completion/truncated") or 0.0
    unread = 1 - (course.recent_mean("completion/answered") or 0.0)
    most = course.config["max_new_tokens"]
    evidence = (
        f"{len(steps) * each} completions in {len(steps)} steps, and not one is right; "
        f"{cut:.0%} were cut off at max_new_tokens={most}, {unread:.0%} hold no answer that can "
        f"be read."
    )
    if cut > 0.5:
        cause = "They end before they come to the answer."
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


def groups_agree(course: RunHistory) -> Finding | None:
    agreeing = course.recent_mean("reward/zero_variance_groups") or 0.0
    if agreeing < course.limits.agreeing_groups or no_reward(course):
        return None
    solved = course.recent_mean("reward/solved_groups") or 0.0
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
        "A group without a difference teaches nothing.",
        f"num_generation={2 * course.config['num_generation']} algorithm.resample=2",
    )


def kl_runs_away(course: RunHistory) -> Finding | None:
    # Not k3: a single token can make it large (docs/kl.md).
    name = "full" if course.recent_mean("kl/full") is not None else "k1"
    kl = course.recent_mean(f"kl/{name}")
    if kl is None or kl < course.limits.kl_high:
        return None
    weight, rate = course.config["kl_weight"], course.config["learning_rate"]
    return Finding(
        f"{kl:.3g} nats a token from the reference (kl/{name}, the last "
        f"{course.limits.window} steps).",
        "The policy leaves the model it came from faster than kl_weight pulls it back.",
        f"learning_rate={rate / 3:.2g}, or kl_weight={max(weight * 3, 0.01):.2g}",
    )


def entropy_collapses(course: RunHistory) -> Finding | None:
    change, solved = (
        course.first_and_last_means("policy/entropy"),
        course.recent_mean("reward/solved_groups") or 0.0,
    )
    if change is None or solved > 0.5:
        return None
    before, now = change
    if now > course.limits.entropy_low or now > before / 4:  # or it was low from the start
        return None
    rate = course.config["learning_rate"] / 3
    return Finding(
        f"{now:.2g} nats a token, {before:.2g} at the start; {solved:.0%} of the groups solved.",
        "The policy says one thing only, so its groups hold nothing to choose from.",
        f"learning_rate={rate:.2g} algorithm.entropy_weight=0.003, or "
        f"{format_kl_override(course, 'dapo')}",
    )


def lengths_explode(course: RunHistory) -> Finding | None:
    before, now = course.first_and_last_means("completion/truncated") or (0.0, 0.0)
    if now < course.limits.truncated_high or now < before + 0.2:
        return None
    tokens = course.config["max_new_tokens"]
    return Finding(
        f"{now:.0%} of the completions are cut off at max_new_tokens={tokens}, {before:.0%} at the "
        f"start.",
        "Longer is rewarded, or averaged so that length dilutes a mistake.",
        f"{format_kl_override(course, 'dr_grpo')}, reward=[answer,soft_overlong], or "
        f"max_new_tokens={tokens * 2}",
    )


def lengths_vanish(course: RunHistory) -> Finding | None:
    change = course.first_and_last_means("completion/length_mean")
    if change is None:
        return None
    before, now = change
    if now > course.limits.length_low * before:
        return None
    accuracy = [line["eval/sampled_accuracy"] for line in course.evaluations]
    if accuracy and accuracy[-1] > accuracy[0]:  # it found a shorter way to be right
        return None
    return Finding(
        f"{now:.1f} tokens a completion, {before:.1f} at the start, and no better accuracy.",
        "Ending at once costs the policy least.",
        "a smaller weight of rewards for shortness, or a larger kl_weight",
    )


def reward_is_hacked(course: RunHistory) -> Finding | None:
    evaluations = course.evaluations
    rewards, spreads = (
        course.first_and_last_means("reward/mean"),
        course.first_and_last_means("reward/std"),
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
    lost = last <= first - course.limits.accuracy_lost
    if not lost and (last > first or last > course.limits.accuracy_low):
        return None
    return Finding(
        f"reward/mean went from {start:.3g} to {now:.3g}, {metric} from {first:.1%} to {last:.1%}.",
        "The policy has found a way to the reward that is not the task.",
        "reward=answer beside your own, a smaller weight of that, or a larger kl_weight; read "
        "completions.jsonl",
    )


def engine_differs(course: RunHistory) -> Finding | None:
    divergence = course.recent_mean("sampler/kl")
    if divergence is None or divergence < course.limits.mismatch_high:
        return None
    sampler = str(course.config["rollout"]["_target_"]).rpartition(".")[2]
    other = "" if sampler == "NativeEngine" else "rollout=native, or "
    return Finding(
        f"sampler/kl is {divergence:.3g} nats a token before anything was updated, where 0 is "
        f"right.",
        "What sampled the completions computes other probabilities than what trains.",
        f"{other}device.precision=fp32",
    )


def gradient_spikes(course: RunHistory) -> Finding | None:
    norms = [line.get("optim/grad_norm") for line in course.steps]
    spikes: list[float] = []
    for n in range(max(0, len(norms) - course.limits.window), len(norms)):
        norm, past = norms[n], [value for value in norms[:n] if value]
        if norm is None:
            spikes.append(float("inf"))
        elif len(past) >= 5 and norm > course.limits.spike * median(past):
            spikes.append(norm / median(past))
    if len(spikes) < course.limits.spikes:
        return None
    return Finding(
        f"{len(spikes)} of the last {course.limits.window} gradients were over "
        f"{course.limits.spike:g} times as long as is usual here, up to {max(spikes):.0f} times.",
        "A few rewards or ratios are far larger than the rest.",
        "optim.max_grad_norm=0.2, rewards of one size, or algorithm.scale=group_std",
    )


def rate_rounds_away(course: RunHistory) -> Finding | None:
    moved = [
        line["optim/moved"]
        for line in course.steps[-course.limits.window :]
        if line.get("optim/moved") is not None and line.get("optim/grad_norm")
    ]
    if not moved or fmean(moved) >= course.limits.moved_low:
        return None
    rate = course.config["learning_rate"]
    return Finding(
        f"an update changes {fmean(moved):.0%} of the weights, though there is a gradient.",
        "The steps are smaller than the weights' last digit.",
        f"learning_rate={max(rate * 100, 1e-6):.2g}",
    )


def verifier_fails(course: RunHistory) -> Finding | None:
    failed = course.recent_mean("reward/failed")
    each = course.config["batch_size"] * course.config["num_generation"]
    if failed is None or failed / each <= course.limits.failed_high:
        return None
    return Finding(
        f"for {failed / each:.0%} of the completions a reward could not be worked out; "
        f"completions.jsonl says why, under failed.",
        "A reward raises, runs out of time, or its endpoint doesn't answer.",
        "a longer timeout of that reward, or its own mending",
    )


def evaluation_overlaps(course: RunHistory) -> Finding | None:
    shares = [line.get("eval/overlap") or 0.0 for line in course.evaluations]
    if max(shares, default=0.0) <= course.limits.overlap_high:
        return None
    return Finding(
        f"{max(shares):.0%} of the evaluation's questions are trained on.",
        "Its accuracy says how well they are remembered.",
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
    """What is wrong with a run, by its metrics.jsonl so far; the order is that of DIAGNOSES."""
    course = RunHistory(lines, config, limits)
    early = len(course.steps) < limits.patience
    found = []
    for name, (title, look) in DIAGNOSES.items():
        sign = None if early and name not in KNOWN_AT_START else look(course)
        if sign is not None:
            found.append(Diagnosis(name, title, *sign))
    return found
