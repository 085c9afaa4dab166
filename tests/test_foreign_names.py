"""Other tools' names: each is answered with a key that exists, as its page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from grpo.cli.explain import compose_choices, list_known_keys
from grpo.config.foreign_names import FOREIGN_NAMES, explain_foreign_name, find_equivalent
from grpo.config.schema import register_schema

PAGE = (Path(__file__).parents[1] / "docs/reference/other-tools.md").read_text()
CHOSEN = (
    "adapter=lora", "tracking=wandb", "model=hub", "dataset=hub", "reward=reward_model",
)  # fmt: skip
FREE = {"reward.NAME.weight"}  # of a name that is the user's
VALUES = {"dapo", "dr_grpo", "bnpo"}
ELSEWHERE = {"dataset.path"}  # of another choice


@pytest.fixture(scope="module")
def known() -> set[str]:
    register_schema()
    return {*list_known_keys(compose_choices("config", CHOSEN)), "hydra.run.dir"}


def test_each_name_stands_for_a_key_that_is_there(known: set[str]) -> None:
    assert {foreign.key for foreign in FOREIGN_NAMES.values()} - known <= FREE | ELSEWHERE


def test_no_name_of_this_project_is_taken_for_another_tools(known: set[str]) -> None:
    for key in known:
        assert explain_foreign_name(key, "1") is None or key not in FOREIGN_NAMES, key
    for name in FOREIGN_NAMES:
        assert name not in known, name


def test_every_name_on_the_page_is_answered(known: set[str]) -> None:
    for names in re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE):
        for name in re.findall(r"`([\w.]+)(?:=[^`]*)?`", names):
            assert name in known or find_equivalent(name) or name in VALUES, name


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("beta", "0.1", "beta: here it is kl_weight; write kl_weight=0.1."),
        (
            "actor_rollout_ref.actor.clip_ratio_high", "0.28",
            "actor_rollout_ref.actor.clip_ratio_high: here it is algorithm.policy_loss.clip_high; "
            "write algorithm.policy_loss.clip_high=0.28.",
        ),
        (
            "model_name_or_path", "org/name",
            "model_name_or_path: here it is model.id; write model=hub model.id=org/name.",
        ),
        (
            "per_device_train_batch_size", "8",
            "per_device_train_batch_size: here it is batch_size (prompts a step, not completions).",
        ),
        ("loss_type", "dapo", "loss_type: here it is algorithm; write algorithm=dapo."),
    ],
)  # fmt: skip
def test_what_is_said(key: str, value: str, says: str) -> None:
    assert str(explain_foreign_name(key, value)) == says
