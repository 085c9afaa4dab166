"""Each diagnosis is found in a real run with that problem.

test_default_run.py tests that a healthy run has no diagnosis.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from markupsafe import escape

from grpo.config.schema import DoctorConfig
from grpo.doctor import diagnoses
from grpo.doctor import sink as watch
from grpo.doctor.diagnoses import DIAGNOSES
from grpo.report.run.read import read_run

Grpo = Callable[..., tuple[int, str]]

QUICK = (
    "tracking=none", "hydra.run.dir=run", "batch_size=4", "num_generation=4", "max_steps=12",
    "eval.every=4", "eval.samples=1", "checkpoint.every=0", "dataset.eval_slice=:24",
    "doctor.patience=6", "doctor.window=3",
)  # fmt: skip
OWN = '''
import torch
from grpo.rollout import NativeEngine
from grpo.types import Failure

def length(samples):
    return [float(len(s.token_ids)) for s in samples]

def shortness(samples):
    return [-float(len(s.token_ids)) for s in samples]

def constant(samples):
    return [1.0 for _ in samples]

def ones(samples):
    return [float(s.completion.count("1")) for s in samples]

def now_and_then(samples):
    scale = 1e5 if samples[0].prompt.count("7") else 1.0
    return [scale * s.verdict for s in samples]

def failing(samples):
    return [Failure("no answer from the judge") if n % 3 == 0 else s.verdict
            for n, s in enumerate(samples)]

class Lying(NativeEngine):
    """Says that it samples from a sharper distribution than it does."""

    def generate(self, prompts, num_generation, sampling, seed):
        from dataclasses import replace
        rollout = super().generate(prompts, num_generation, sampling, seed)
        return replace(rollout, logprobs_NC=rollout.logprobs_NC - 0.3)
'''


def use_own(name: str) -> tuple[str, str, str]:
    """Returns the overrides for a reward from own.py instead of the default one."""
    return "~reward.answer", f"+reward.own._target_=own.{name}", "+reward.own.weight=1.0"


SICK: dict[str, tuple[str, ...]] = {
    "no_reward": ("max_new_tokens=2",),
    "groups_agree": use_own("constant"),
    "kl_runs_away": ("learning_rate=0.01",),
    "entropy_collapses": (*use_own("ones"), "learning_rate=0.003", "max_steps=40", "kl_weight=0"),
    "lengths_explode": (*use_own("length"), "learning_rate=0.003", "max_steps=20", "kl_weight=0"),
    "lengths_vanish": (*use_own("shortness"), "learning_rate=0.001", "max_steps=18", "kl_weight=0"),
    "reward_is_hacked": (*use_own("length"), "learning_rate=0.002", "max_steps=16", "kl_weight=0"),
    "engine_differs": ("rollout._target_=own.Lying",),
    "gradient_spikes": (
        *use_own("now_and_then"), "algorithm=dr_grpo", "batch_size=1", "doctor.window=15",
        "doctor.spikes=2", "max_steps=30", "learning_rate=1e-5",
    ),
    "rate_rounds_away": ("learning_rate=1e-13",),
    "verifier_fails": use_own("failing"),
    "evaluation_overlaps": (
        "dataset.slice=:32", "dataset.eval_slice=:24", "dataset.eval_split=train",
        "dataset.allow_overlap=true",
    ),
}  # fmt: skip


def test_every_diagnosis_has_its_patient() -> None:
    assert set(SICK) == set(DIAGNOSES)


def test_every_limit_is_a_key_that_is_read_and_explained() -> None:
    code = Path(diagnoses.__file__).read_text() + Path(watch.__file__).read_text()
    page = (Path(__file__).parents[1] / "docs/doctor.md").read_text()
    for limit in fields(DoctorConfig):
        assert f"limits.{limit.name}" in code
        assert f"`{limit.name}`" in page or f"`doctor.{limit.name}`" in page, limit.name


LONG = (
    "groups_agree",
    "rate_rounds_away",
    "verifier_fails",
    "kl_runs_away",
    "entropy_collapses",
    "lengths_explode",
    "lengths_vanish",
    "reward_is_hacked",
    "gradient_spikes",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in SICK],
)
def test_a_sick_run_is_told_what_it_has(name: str, grpo: Grpo, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    code, printed = grpo(*QUICK, *SICK[name])
    assert code == 0, printed
    title = DIAGNOSES[name][0]
    assert title in printed, printed  # during the run
    assert printed.count(f"{title}: ") == 1  # and only once
    found = {diagnosis.name: diagnosis for diagnosis in read_run(tmp_path / "run").diagnoses}
    assert name in found
    assert found[name].evidence
    assert found[name].remedy
    page = (tmp_path / "run/report.html").read_text()
    assert escape(title) in page


def test_a_reward_that_rises_while_nothing_is_ever_right(grpo: Grpo, tmp_path: Path) -> None:
    """The accuracy can't fall: eight tokens are too few for an answer."""
    (tmp_path / "own.py").write_text(OWN)
    code, printed = grpo(
        *QUICK, *use_own("ones"), "learning_rate=0.003", "kl_weight=0", "max_new_tokens=8",
        "max_steps=20",
    )  # fmt: skip
    assert code == 0, printed
    found = {
        diagnosis.name: diagnosis.evidence for diagnosis in read_run(tmp_path / "run").diagnoses
    }
    assert "eval/sampled_accuracy from 0.0% to 0.0%" in found["reward_is_hacked"]


def test_none_is_silent(grpo: Grpo, tmp_path: Path) -> None:
    quick = [override for override in QUICK if not override.startswith("doctor.")]
    code, printed = grpo(*quick, "max_new_tokens=2", "doctor=none")
    assert code == 0, printed
    assert "no reward" not in printed
    assert "Diagnoses" not in (tmp_path / "run/report.html").read_text()


def test_a_window_of_nothing_is_refused(grpo: Grpo) -> None:
    code, printed = grpo(*QUICK, "doctor.window=0")
    assert code == 2
    assert "doctor.window=0" in printed


def test_limits_can_be_set(grpo: Grpo, tmp_path: Path) -> None:
    code, printed = grpo(*QUICK, "doctor.kl_high=0.0001")
    assert code == 0, printed
    assert "the KL runs away" in printed
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    kl = [json.loads(line)["kl/k1"] for line in lines if "kl/k1" in line][-3:]
    (diagnosis,) = [d for d in read_run(tmp_path / "run").diagnoses if d.name == "kl_runs_away"]
    assert diagnosis.evidence.startswith(f"{sum(kl) / 3:.3g} nats a token")
