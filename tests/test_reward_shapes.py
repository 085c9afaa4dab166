"""Rewards for the form of a completion, by hand, and the choices in conf/reward."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from grpo.config.binding import check_options
from grpo.config.schema import find_conf_folder
from grpo.errors import ConfigError
from grpo.rewards import Cosine, Length, ReasoningSteps, Repetition, SoftOverlong, TagCount
from grpo.types import Example, Sample


def build_sample(text: str = "", tokens: int = 1, right: bool = False, group: int = 0) -> Sample:
    return Sample(
        prompt="q",
        completion=text,
        token_ids=tuple(range(tokens)),
        truncated=False,
        example=Example("q", "a", lambda _: float(right)),
        group=group,
    )


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a</think><answer>5</answer>", 1.0),
        ("<think>\na\n</think>\n<answer>\n5\n</answer>\n", 1.0),  # line breaks don't matter
        ("<think>a</think> 5", 0.5),
        ("<answer>5</answer><answer>6</answer>", 0.0),  # twice is not once
        ("<think><answer>5</answer>", 0.75),
        ("5", 0.0),
    ],
)
def test_each_tag_that_is_there_once_counts_its_share(text: str, reward: float) -> None:
    assert TagCount()([build_sample(text)]) == [reward]


def test_tags_can_be_others() -> None:
    assert TagCount(["[a]", "[/a]", "[b]"])([build_sample("[a]x[/a]")]) == [pytest.approx(2 / 3)]


@pytest.mark.parametrize(
    ("text", "markers"),
    [
        ("", 0),
        ("Step 1: add. Step 2: take away.", 2),
        ("1. add\n2) take away", 2),
        ("- add\n* take away", 2),
        ("First, add. Finally, done.", 2),
        ("first, second, next, finally, and done", 3),  # capped
        ("12 - 5 is 7, and **bold** is not a bullet", 0),
        ("the first one is 3.5", 0),
    ],
)
def test_steps_are_a_share_of_the_target(text: str, markers: int) -> None:
    assert ReasoningSteps(target=3)([build_sample(text)]) == [pytest.approx(markers / 3)]


def test_length_is_relative_to_its_own_group() -> None:
    group = [build_sample(tokens=n, right=right) for n in (10, 20, 30) for right in (True, False)]
    other = [build_sample(tokens=n, right=True, group=1) for n in (100, 300)]
    assert Length()([*group, *other]) == [0.5, 0.0, 0.0, 0.0, -0.5, -0.5, 0.5, -0.5]


def test_completions_of_one_length_get_no_length_reward() -> None:
    assert Length()([build_sample(tokens=5, right=True), build_sample(tokens=5)]) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("tokens", "right", "wrong"),
    [
        (0, 2.0, -10.0),
        (25, 1.8535534, -8.5355339),  # 1 + 0.8535534 and -10 x 0.8535534: (1 + cos 45°) / 2
        (50, 1.5, -5.0),
        (100, 1.0, 0.0),
        (1000, 1.0, 0.0),  # beyond max_tokens
    ],
)
def test_cosine_falls_for_right_and_rises_for_wrong(
    tokens: int, right: float, wrong: float
) -> None:
    rewards = Cosine(max_tokens=100)(
        [build_sample(tokens=tokens, right=True), build_sample(tokens=tokens)]
    )
    assert rewards == [pytest.approx(right), pytest.approx(wrong, abs=1e-6)]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("", 0.0),
        ("a b", 0.0),  # too short for a trigram
        ("a b c d", 0.0),
        ("a b c a b c", -0.25),  # abc bca cab abc: 3 of 4 are distinct
        ("A b c  a\nb C", -0.25),
        ("no no no no no no", -0.75),  # 1 of 4
    ],
)
def test_repetition_is_the_share_of_trigrams_seen_before(text: str, reward: float) -> None:
    assert Repetition()([build_sample(text)]) == [reward]


def test_repetition_over_tokens_sees_no_words() -> None:
    repeated = Sample("q", "abc", (7, 7, 7, 7), False, Example("q", "a", float), 0)
    penalty = Repetition(ngram=2, max_penalty=-0.3, over="tokens")
    assert penalty([repeated, build_sample("no no no", tokens=9)]) == [pytest.approx(-0.2), 0.0]


@pytest.mark.parametrize(
    ("tokens", "reward"), [(1, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1), (150, -1)]
)
def test_overlong_falls_over_the_buffer(tokens: int, reward: float) -> None:
    punished = SoftOverlong(max_tokens=100, buffer=20)
    assert punished([build_sample(tokens=tokens)]) == [pytest.approx(reward)]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TagCount([]), "tags="),
        (lambda: TagCount("<b>"), "tags='<b>'"),
        (lambda: ReasoningSteps(0), "target=0"),
        (lambda: Cosine(0), "max_tokens=0"),
        (lambda: Repetition(ngram=0), "ngram=0"),
        (lambda: Repetition(max_penalty=1.0), "max_penalty=1.0"),
        (lambda: Repetition(over="letters"), "words or tokens"),
        (lambda: SoftOverlong(100, 0), "buffer=0"),
        (lambda: SoftOverlong(100, 101), "buffer=101"),
    ],
)
def test_a_bad_option_is_named_with_its_value(make: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("'", ".")):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    "name",
    [
        *("tag_count", "reasoning_steps", "length", "cosine", "repetition", "soft_overlong"),
        *("math", "code", "reward_model", "endpoint"),
    ],
)
def test_each_choice_gives_its_class_what_it_takes(name: str) -> None:
    choice = OmegaConf.load(Path(find_conf_folder()) / "reward" / f"{name}.yaml")
    page = OmegaConf.create({"max_new_tokens": 48, "reward": choice})
    for missing in OmegaConf.missing_keys(page):
        OmegaConf.update(page, missing, "given")
    (options,) = OmegaConf.to_container(page, resolve=True)["reward"].values()  # type: ignore[index,call-overload,union-attr]
    assert options.pop("weight") == 1.0
    check_options(get_object(options.pop("_target_")), options, f"reward.{name}")
