"""A trained model leaves the bench: as a plain folder with a card, and in a conversation."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.export import licence_of
from tests.conftest import metrics

Grpo = Callable[..., tuple[int, str]]
SHORT = ("experiment=smoke", "tracking=none", "dataset.eval_size=16", "hydra.run.dir=run")


@pytest.fixture
def run(grpo: Grpo, tmp_path: Path) -> Path:
    code, printed = grpo(*SHORT, "kl_weight=0.05")
    assert code == 0, printed
    return tmp_path / "run"


def test_an_exported_model_is_the_trained_one(run: Path, grpo: Grpo, tmp_path: Path) -> None:
    code, printed = grpo("export", "run", "mine")
    assert code == 0, printed
    mine = AutoModelForCausalLM.from_pretrained(tmp_path / "mine", dtype=torch.float32)
    trained = AutoModelForCausalLM.from_pretrained(
        run / "checkpoints/latest/model", dtype=torch.float32
    )
    for name, weight in trained.state_dict().items():
        assert torch.equal(weight, mine.state_dict()[name]), name
    assert AutoTokenizer.from_pretrained(tmp_path / "mine").chat_template


def test_its_card_says_what_it_is(run: Path, grpo: Grpo, tmp_path: Path) -> None:
    assert grpo("export", "run", "mine")[0] == 0
    card = (tmp_path / "mine/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "unknown"  # the packaged model has no card of its own
    assert "grpo" in front["tags"]
    summary = json.loads((run / "summary.json").read_text())
    first, last = (summary[key]["eval/accuracy"] for key in ("first_evaluation", "last_evaluation"))
    assert f"| eval/accuracy | {first:.4g} | {last:.4g} |" in card
    assert "| `kl_weight` | 0.05 | 0.02 |" in card
    assert "grpo.data.Arithmetic" in card


def test_the_card_of_a_checkpoint_speaks_of_no_later_step(
    run: Path, grpo: Grpo, tmp_path: Path
) -> None:
    assert grpo("export", "run/checkpoints/step_2", "mine")[0] == 0
    card = (tmp_path / "mine/README.md").read_text()
    by_step = {line["step"]: line for line in metrics(run)}
    first, then = (by_step[step]["eval/sampled_accuracy"] for step in (0, 2))
    assert f"| eval/sampled_accuracy | {first:.4g} | {then:.4g} |" in card
    assert "in 2 steps." in card
    assert "eval/accuracy" in by_step[3]  # the run has a later one


@pytest.mark.parametrize(
    ("text", "licence"),
    [("---\nlicense: apache-2.0\n---\n# A", "apache-2.0"), ("# A", None), (None, None)],
)
def test_the_licence_is_the_base_models(
    text: str | None, licence: str | None, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert licence_of(str(tmp_path)) == licence


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a run and the folder"),
        (("run",), "name a run and the folder"),
        (("nowhere", "mine"), "holds no run"),
        (("run", "run"), "is there already"),
        (("run", "mine", "--push"), "needs the model's id"),
        (("run", "mine", "--push", "not an id"), "needs the model's id"),
        (("run", "mine", "--push=no"), "--push no: needs the model's id"),
        (("run", "mine", "--push", "some/body"), "--push some/body: "),
    ],
)
def test_what_cannot_be_exported_is_refused(
    arguments: tuple[str, ...], message: str, run: Path, grpo: Grpo, tmp_path: Path
) -> None:  # fmt: skip
    code, printed = grpo("export", *arguments)
    assert code == 2, printed
    assert message in printed
    assert not (tmp_path / "mine").exists()


def test_both_models_answer_side_by_side(
    run: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 12 + 7?\n/temperature 0.5\n/quit\n"))
    monkeypatch.setenv("COLUMNS", "120")
    code, printed = grpo("chat", "run", "max_new_tokens=40")
    assert code == 0, printed
    assert re.search(r"base: tiny.*trained: run", printed)  # in one line
    assert printed.count("<answer>") == 2
    assert "temperature 0.5" in printed


def test_a_plain_model_answers_alone(
    run: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert grpo("export", "run", "mine")[0] == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 12 + 7?\n"))
    code, printed = grpo("chat", "mine", "max_new_tokens=40")
    assert code == 0, printed
    assert "base" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name one run or model"),
        (("nowhere",), "nowhere"),
        (("run", "temperature=hot"), "should be a number"),
        (("run", "max_new_tokens=0"), "max_new_tokens=0"),
        (("run", "top_k=3"), "top_k=3"),
    ],
)
def test_what_cannot_chat_is_refused(arguments: tuple[str, ...], message: str, grpo: Grpo) -> None:
    code, printed = grpo("chat", *arguments)
    assert code == 2, printed
    assert message in printed
