#!/usr/bin/env python
"""Measures what each estimator of the KL costs, on a trained run: scripts/measure_kl.py RUN OUT

Samples from the run's policy, and holds each estimator against the exact divergence at the same
tokens: as a value, and as a loss, by its gradient. The run should have been made with kl=full, so
that its own course can be drawn too. Writes OUT.json and OUT.svg; docs/kl.md is made of them.
"""

from __future__ import annotations

import argparse
import json
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

matplotlib.use("svg")
from matplotlib import pyplot as plt

from grpo.build.data import build_prompt_format, build_prompts
from grpo.build.objective import build_objective
from grpo.config import schema
from grpo.device import open_device
from grpo.locate import find_for_training
from grpo.memory.budget import Budget
from grpo.memory.microbatch import score_rollout
from grpo.models.head import Readout
from grpo.models.load import LanguageModel, load_language_model
from grpo.models.reference import Reference
from grpo.objective import DIVERGENCES, ESTIMATORS
from grpo.rollout import NativeEngine
from grpo.runs.folder import find_checkpoint_model
from grpo.runs.jsonl import read_lines
from grpo.training.loss import KLTerm, UpdateInputs
from grpo.training.optimizer import SCHEDULES, Optimizer
from grpo.training.update import update_policy
from grpo.types import Rollout

PROMPTS, COMPLETIONS = 16, 8
BUDGET = Budget.from_tokens(4096, cache_positions=32768)


@dataclass(frozen=True)
class Term:
    """One way to have the divergence in the loss."""

    label: str
    term: KLTerm
    truth: str  # the direction whose exact gradient it is held against


def list_terms() -> list[Term]:
    terms = []
    for direction, names in ESTIMATORS.items():
        for name, estimator in names.items():
            for unbiased in (False, True):
                # Those that docs/kl.md tells of: k2 is no unbiased value, so it isn't weighed.
                if (name == "k2" and unbiased) or (direction == "forward" and not unbiased):
                    continue
                label = f"{name}{', weighed' if unbiased else ''}"
                term = KLTerm(estimator, None, in_reward=False, unbiased_gradient=unbiased)
                terms.append(Term(f"{label} ({direction})", term, direction))
    return terms


class Gradient(Optimizer):
    """Keeps the gradient that it is given, and moves nothing."""

    flat: Tensor

    def step(self) -> dict[str, float]:
        self.flat = torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])
        self.adamw.zero_grad(set_to_none=True)
        return {"optim/grad_norm": float(self.flat.norm())}


@dataclass(frozen=True)
class Bench:
    cfg: DictConfig
    policy: LanguageModel
    reference: Reference

    def compute_gradient(self, rollout: Rollout, term: KLTerm, reference_NC: Tensor) -> Tensor:
        """Of the divergence as a mean over the tokens of a rollout."""
        self.cfg.algorithm.averaging = "token_mean"
        objective = build_objective(self.cfg)
        recorder = Gradient(
            self.policy.model, "adamw", 0.0, 1, SCHEDULES["constant"], 0, 0.0, (0.9, 0.99), 0.0
        )
        nothing = torch.zeros(len(rollout.texts))
        learned = UpdateInputs(nothing, None, reference_NC, 1.0)
        with_term = type(objective)(**{**vars(objective), "kl": term})
        update_policy(
            self.policy, self.reference, recorder, with_term, rollout, learned, BUDGET.forward_limit
        )
        return recorder.flat


def measure(run: Path, batches: int) -> dict[str, Any]:
    """Values and gradients of all estimators over some batches of completions."""
    schema.register_schema()
    cfg = OmegaConf.load(run / ".hydra" / "config.yaml")
    assert isinstance(cfg, DictConfig)
    device, inputs = open_device("cpu", "fp32"), find_for_training(cfg)
    policy = load_language_model(find_checkpoint_model(str(run)), device)
    base = load_language_model(inputs.model(), device)
    bench = Bench(cfg, policy, Reference(base, nullcontext, list))
    sampling = build_objective(cfg).sampling
    engine = NativeEngine(policy, cfg.max_new_tokens, BUDGET)
    formats = [
        build_prompt_format(example_set.options, example_set.key) for example_set in inputs.sets
    ]
    prompts = build_prompts(inputs, formats, policy.tokenizer).train
    exact_terms = {d: KLTerm(None, f, False, False) for d, f in DIVERGENCES.items()}

    errors: dict[str, list[Tensor]] = {}
    exact: dict[str, list[Tensor]] = {}
    gradients: dict[str, list[Tensor]] = {}
    for batch in range(batches):
        chosen = [prompts[(batch * PROMPTS + n) % len(prompts)] for n in range(PROMPTS)]
        rollout = engine.generate(chosen, COMPLETIONS, sampling, seed=10_000 + batch)
        mask_NC = rollout.mask_NC
        reference_NC = score_rollout(
            base, rollout, Readout(sampling), BUDGET.forward_limit
        ).plain_logprobs
        for direction, divergence in DIVERGENCES.items():
            readout = Readout(sampling, divergence=divergence)
            scored = score_rollout(policy, rollout, readout, BUDGET.forward_limit, bench.reference)
            truth_T = scored.divergence[mask_NC].double()
            exact.setdefault(direction, []).append(truth_T)
            for name, estimator in ESTIMATORS[direction].items():
                found_T = estimator(
                    scored.plain_logprobs[mask_NC].double(), reference_NC[mask_NC].double()
                )
                errors.setdefault(f"{name} ({direction})", []).append(found_T - truth_T)
            gradient_P = bench.compute_gradient(rollout, exact_terms[direction], reference_NC)
            gradients.setdefault(f"exact ({direction})", []).append(gradient_P)
        for term in list_terms():
            gradient_P = bench.compute_gradient(rollout, term.term, reference_NC)
            gradients.setdefault(term.label, []).append(gradient_P)
        print(f"{batch + 1} of {batches} batches", flush=True)
    return {
        "batches": batches,
        "tokens": int(sum(len(t) for t in exact["reverse"])),
        "exact": {d: float(torch.cat(by_batch).mean()) for d, by_batch in exact.items()},
        "values": {label: summarize_values(by_batch) for label, by_batch in errors.items()},
        "gradients": {
            label: summarize_gradients(torch.stack(by_batch), gradients)
            for label, by_batch in gradients.items()
        },
    }


def summarize_values(batches: list[Tensor]) -> dict[str, float]:
    """How far an estimate is from the exact value: on average, by token, and by batch."""
    error_T = torch.cat(batches)
    by_batch = torch.stack([batch.mean() for batch in batches])
    return {
        "bias": float(error_T.mean()),
        "bias_error": float(error_T.std()) / math.sqrt(len(error_T)),
        "std_token": float(error_T.std()),
        "std_batch": float(by_batch.std()),
    }


def summarize_gradients(
    gradient_KP: Tensor, gradients: dict[str, list[Tensor]]
) -> dict[str, float]:
    """A loss's gradient beside the exact ones: its direction on average, and its noise.

    The noise is the distance of one batch's gradient from that batch's exact one, in lengths of the
    mean exact gradient; it counts only for the direction that the loss is meant for.
    """
    figures = {"length": float(gradient_KP.mean(0).norm())}
    for direction in DIVERGENCES:
        exact_KP = torch.stack(gradients[f"exact ({direction})"])
        mean_P, size = exact_KP.mean(0), exact_KP.mean(0).norm()
        figures[f"cosine_{direction}"] = float(
            torch.nn.functional.cosine_similarity(gradient_KP.mean(0), mean_P, dim=0)
        )
        figures[f"noise_{direction}"] = float((gradient_KP - exact_KP).norm(dim=1).mean() / size)
        figures[f"bias_{direction}"] = float((gradient_KP.mean(0) - mean_P).norm() / size)
    return figures


def draw(run: Path, measured: dict[str, Any], out: Path) -> None:
    plt.rcParams.update({"font.size": 10, "svg.hashsalt": "grpo", "axes.grid": True})
    plt.rcParams.update({"grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False})
    figure, (course, value, gradient) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    steps = [line for line in read_lines(run / "metrics.jsonl") if "kl/full" in line]
    x = [line["step"] for line in steps]
    for name, colour in (("k1", "C0"), ("k2", "C1"), ("k3", "C2")):
        y = [line[f"kl/{name}"] for line in steps]
        course.plot(x, y, color=colour, linewidth=1, label=name)
    y = [line["kl/full"] for line in steps]
    course.plot(x, y, color="black", linewidth=2, label="exact")
    course.set(xlabel="step", ylabel="nats a token", title="the run, as logged")
    course.legend(frameon=False)

    labels = [label for label in measured["values"] if "reverse" in label]
    bias = [measured["values"][label]["bias"] for label in labels]
    noise = [measured["values"][label]["std_batch"] for label in labels]
    places = range(len(labels))
    value.bar([p - 0.2 for p in places], bias, 0.4, label="bias", color="C3")
    value.bar([p + 0.2 for p in places], noise, 0.4, label="spread from batch to batch", color="C7")
    value.axhline(measured["exact"]["reverse"], color="black", linewidth=1, label="the exact value")
    value.set_xticks(list(places), [label.removesuffix(" (reverse)") for label in labels])
    value.set(ylabel="nats a token", title="as a value", ylim=(None, 0.075))
    value.legend(frameon=False, loc="upper left")

    names = {
        "k1 (reverse)": "k1", "k2 (reverse)": "k2", "k3 (reverse)": "k3",
        "k1, weighed (reverse)": "k1\nweighed", "k3, weighed (reverse)": "k3\nweighed",
    }  # fmt: skip
    cosine = [measured["gradients"][label]["cosine_reverse"] for label in names]
    noise = [measured["gradients"][label]["noise_reverse"] for label in names]
    places = range(len(names))
    gradient.bar(
        [p - 0.2 for p in places], cosine, 0.4, label="cosine with the exact one", color="C2"
    )
    gradient.bar(
        [p + 0.2 for p in places],
        noise,
        0.4,
        label="noise of one batch, in its lengths",
        color="C7",
    )
    gradient.set_xticks(list(places), list(names.values()))
    gradient.set(title="as a loss: the gradient", ylim=(0, 6))
    gradient.legend(frameon=False, loc="upper left")
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path, help="without a suffix")
    parser.add_argument("--batches", type=int, default=40, help="of 16 x 8 completions")
    arguments = parser.parse_args()
    measured = measure(arguments.run, arguments.batches)
    arguments.out.with_suffix(".json").write_text(json.dumps(measured, indent=1) + "\n")
    draw(arguments.run, measured, arguments.out.with_suffix(".svg"))
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
