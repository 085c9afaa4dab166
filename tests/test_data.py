"""Rows, slices, prompts and their order."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from grpo.build.data import build_prompt_format, build_prompts
from grpo.config import schema
from grpo.data import GSM8K, Arithmetic, Jsonl, ReasoningGym
from grpo.data.answers import (
    answered,
    extract_boxed_answer,
    extract_likely_answer,
    extract_tagged_answer,
    is_same_answer,
)
from grpo.data.arithmetic import is_held_out
from grpo.data.order import order_mix, order_one_set
from grpo.data.prompts import LazyPrompts, PromptFormat, PromptSets, WorkedExample
from grpo.data.rows import Examples
from grpo.data.slices import parse_slice
from grpo.data.source import Slices, Source
from grpo.errors import ConfigError
from grpo.locate import ExampleSet, RunInputs
from grpo.models.load import LanguageModel
from grpo.types import Example
from grpo.verifiers.numbers import find_last_number

GSM8K_FILE = Path(__file__).parents[2] / "shared/data/gsm8k/train.jsonl"
ROW = st.one_of(st.just(""), st.integers(-120, 120).map(str))
PERCENT = st.one_of(st.just(""), st.integers(-100, 100).map("{}%".format))
BOUNDS = st.one_of(st.tuples(ROW, ROW), st.tuples(PERCENT, PERCENT))


@given(st.integers(1, 100), BOUNDS)
def test_slices_are_those_of_the_datasets_library(rows: int, bounds: tuple[str, str]) -> None:
    start, stop = bounds
    table = datasets.Dataset.from_dict({"n": list(range(rows))})
    read = datasets.ReadInstruction.from_spec(f"train[{start}:{stop}]")
    (absolute,) = read.to_absolute({"train": table.num_rows})
    expected = list(range(rows))[absolute.from_ : absolute.to]
    if not expected:
        with pytest.raises(ConfigError, match="selects none"):
            parse_slice(f"{start}:{stop}", rows, "dataset.slice")
    else:
        assert list(parse_slice(f"{start}:{stop}", rows, "dataset.slice")) == expected


@pytest.mark.parametrize("text", ["5", "a:b", "1:2:3", ":5.5%", ":200%", "1:15%", "train[:5%]", ""])
def test_what_is_no_slice_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.slice="):
        parse_slice(text, 100, "dataset.slice")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>72</answer>", "72"),
        ("<think>1</think> <answer>\n 72 \n</answer>", "72"),
        ("<answer>1</answer> no: <answer>2</answer>", "2"),
        ("<answer><answer>3</answer></answer>", "3"),
        ("the tag <answer> is <answer>4</answer>", "4"),
        ("<answer>5", None),
        ("72", None),
        ("<answer></answer>", ""),
    ],
)
def test_the_tagged_answer(text: str, answer: str | None) -> None:
    assert extract_tagged_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 and 4.", "4"),
        ("The answer is 3, as you see", "3"),
        ("$1,234.50 a day", "1,234.50"),
        ("-7", "-7"),
        ("it is -7", "-7"),
        ("12-5", "5"),
        ("from 3 - 4", "4"),
        ("1,2,3", "3"),
        ("1,2345", "2345"),
        ("2.5.", "2.5"),
        ("none", None),
        ("1. x", "1"),
    ],
)
def test_the_last_number(text: str, number: str | None) -> None:
    found = find_last_number(text)
    assert (None if found is None else found.lstrip("$")) == number


@pytest.mark.parametrize(
    ("given_answer", "gold", "same"),
    [
        ("72", "72", True),
        ("72.0", "72", True),
        ("1,234", "1234", True),
        ("12,34", "1234", False),
        ("$5", "5", True),
        ("5%", "5", True),
        ("5.", "5", True),
        ("72 apples", "72", False),
        ("-3", "3", False),
        ("Paris", " paris ", True),
        ("", "0", False),
        ("nan", "nan", True),
        ("1e2", "100", True),
    ],
)
def test_answers_compare_as_numbers_where_they_are(
    given_answer: str, gold: str, same: bool
) -> None:
    assert is_same_answer(given_answer, gold) is same


def test_arithmetic_is_right_and_held_out_for_good() -> None:
    train = Arithmetic(size=500, eval_size=1, seed=1).rows("train")
    held_out = Arithmetic(size=1, eval_size=200, seed=2).rows("test")
    for example in (*train, *held_out):
        a, b = example.columns["a"], example.columns["b"]
        result = a + b if example.columns["operation"] == "+" else a - b
        assert example.answer == str(result)
        assert example.verify(f"<answer>{result}</answer>") == 1.0
        assert example.verify(f"<answer>{result + 1}</answer>") == 0.0
    assert not any(is_held_out(e.question) for e in train)
    assert all(is_held_out(e.question) for e in held_out)
    assert len({e.question for e in train}) == 500


def test_all_problems_there_are_can_be_had_and_not_one_more() -> None:
    """With one digit there are 10 x 10 sums, and 55 differences that are not negative."""
    sums = {f"What is {a} + {b}?" for a in range(10) for b in range(10)}
    differences = {f"What is {a} - {b}?" for a in range(10) for b in range(a + 1)}
    assert len(sums | differences) == 155
    held_out = {question for question in sums | differences if is_held_out(question)}
    for split, questions in (("train", (sums | differences) - held_out), ("test", held_out)):
        size = len(questions)
        rows = Arithmetic(size=size, eval_size=size, digits=1).rows(split)
        assert {row.question for row in rows} == questions
        for more in (size + 1, 10**9):  # the second is refused without drawing
            with pytest.raises(ConfigError, match=rf"size={more}: there are only about \d+ diff"):
                Arithmetic(size=more, eval_size=more, digits=1).rows(split)


@pytest.mark.skipif(not GSM8K_FILE.is_file(), reason="needs GSM8K's train.jsonl beside the project")
def test_gsm8k_gold_answers_are_the_numbers_behind_the_marks() -> None:
    slices = Slices("train", ":5%", "test", "-128:")
    source = GSM8K(str(GSM8K_FILE))
    train, evaluation = (
        slices.read_training_examples(source),
        slices.read_evaluation_examples(source),
    )
    assert (len(train), len(evaluation)) == (374, 128)
    assert train[0].answer == "72"  # Natalia's clips
    for example in (*train, *evaluation):
        assert str(float(example.answer))  # a plain number: no comma, no $
        assert example.verify(f"so <answer>{example.answer}</answer>") == 1.0


def test_gold_answers_lose_commas_and_dollars(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"question": "q", "answer": "work #### $1,234"}\n')
    assert EVERYTHING.read_training_examples(GSM8K(str(file)))[0].answer == "1234"


def test_a_row_with_nothing_behind_its_marks_is_refused(tmp_path: Path) -> None:
    """An empty gold answer would make every empty answer right."""
    file = tmp_path / "train.jsonl"
    file.write_text('{"question": "q", "answer": "work ####"}\n')
    with pytest.raises(ConfigError, match="row 1 has nothing after"):
        EVERYTHING.read_training_examples(GSM8K(str(file)))


def test_a_folder_has_a_file_for_each_split(tmp_path: Path) -> None:
    for split, answer in (("train", 1), ("test", 2)):
        row = {"question": split, "answer": f"#### {answer}"}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    source = GSM8K(str(tmp_path))
    assert EVERYTHING.read_training_examples(source)[0].answer == "1"
    assert EVERYTHING.read_evaluation_examples(source)[0].answer == "2"
    with pytest.raises(ConfigError, match=r"holds no split dev, .*; it has test, train"):
        source.rows("dev")


def test_a_jsonl_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    rows = [{"ask": f"q\u2028{i}", "gold": i, "source": "mine"} for i in range(10)]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    source = Jsonl(str(file), question_column="ask", answer_column="gold")
    slices = Slices("train", ":90%", "test", "90%:")
    assert [e.answer for e in slices.read_training_examples(source)] == [str(i) for i in range(9)]
    (last,) = slices.read_evaluation_examples(source)
    assert last.question == "q\u20289"
    assert last.columns["source"] == "mine"


def test_parquet_reads_as_jsonl_does(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": str(i)} for i in range(4)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "own.parquet")
    examples = Slices("train", ":2", "test", "2:").read_training_examples(
        Jsonl(str(tmp_path / "own.parquet"))
    )
    assert [(e.question, e.answer) for e in examples] == [("q0", "0"), ("q1", "1")]


def test_reasoning_gym_scores_by_its_own_verifier_and_leaks_no_credit() -> None:
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    source = ReasoningGym("chain_sum", 20, 5, options, extract="number")
    for example in source.rows("train"):
        assert example.verify(f"The answer is {example.answer}.") == 1.0
        assert example.verify("The answer is 999.") == 0.0
        assert example.verify("I don't know") == 0.0
    lenient = ReasoningGym("chain_sum", 1, 5, options, extract="text", strict=False).rows("train")[
        0
    ]
    strict = ReasoningGym("chain_sum", 1, 5, options, extract="text").rows("train")[0]
    wordy = f"The answer is {strict.answer}"
    assert 0 < lenient.verify(wordy) < 1  # lenient gives partial credit for text around it
    assert strict.verify(wordy) == 0.0


EVERYTHING = Slices("train", ":", "test", ":")


class Rows(Source):
    def __init__(self, train: list[str], test: list[str]) -> None:
        self.splits = {"train": train, "test": test}

    def rows(self, split: str) -> list[str]:
        return self.splits[split]

    def example(self, row: str, number: int) -> Example:
        return answered(row, "1", "tag", {})


def make_prompts(source: Source, tokenizer: object, **options: object) -> PromptSets:
    """Makes the prompts of a source, with these options of conf/dataset/_base.yaml."""
    base = OmegaConf.load(schema.find_conf_folder() / "dataset/_base.yaml")
    keys = OmegaConf.merge(base, {"system_prompt": None, **options})
    train, evaluation = (
        EVERYTHING.read_training_examples(source),
        EVERYTHING.read_evaluation_examples(source),
    )
    inputs = RunInputs([ExampleSet("dataset", "", 1.0, train, evaluation, keys)], Path)  # type: ignore[arg-type]
    return build_prompts(
        inputs,
        [build_prompt_format(example_set.options, example_set.key) for example_set in inputs.sets],
        tokenizer,
    )  # type: ignore[arg-type]


def make_example(question: str) -> Example:
    return answered(question, "4", "tag", {})


def list_questions(prompts: list[object]) -> list[str]:
    return [prompt.example.question for prompt in prompts]  # type: ignore[attr-defined]


def test_training_never_sees_an_evaluation_row_unless_asked(
    tiny: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    source = Rows(["a", "b", "c"], ["c", "d"])
    assert list_questions(make_prompts(source, tiny.tokenizer).train) == ["a", "b"]
    assert "1 training rows are evaluation rows too" in caplog.text
    asked = make_prompts(source, tiny.tokenizer, allow_overlap=True)
    assert list_questions(asked.train) == ["a", "b", "c"]
    with pytest.raises(ConfigError, match="every training row"):
        make_prompts(Rows(["c"], ["c"]), tiny.tokenizer)


def test_overlong_prompts_are_dropped_and_counted(
    tiny: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    source = Rows(["short", "long " * 50], ["even"])
    prompts = make_prompts(source, tiny.tokenizer, max_prompt_tokens=40)
    assert list_questions(prompts.train) == ["short"]
    assert "1 of 2 training prompts are longer than dataset.max_prompt_tokens=40" in caplog.text
    with pytest.raises(ConfigError, match="so none is left"):
        make_prompts(source, tiny.tokenizer, max_prompt_tokens=3)


def test_a_prompt_is_the_chat_with_its_worked_examples(tiny: LanguageModel) -> None:
    format = PromptFormat("Be brief.", (WorkedExample("1+1?", "2"),), True, {}, 100)
    text, tokens = format.render(make_example("2+2?"), tiny.tokenizer)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tiny.tokenizer.decode(tokens) == text


def test_without_a_chat_template_a_prompt_is_plain_text(tiny: LanguageModel) -> None:
    tiny.tokenizer.chat_template = None
    text, _ = PromptFormat("Be brief.", (), True, {}, 100).render(
        make_example("2+2?"), tiny.tokenizer
    )
    assert text == "Be brief.\n\n2+2?\n\n"


def test_plain_text_is_left_as_it_is(tiny: LanguageModel) -> None:
    """A base model continues the question's text."""
    text, _ = PromptFormat(None, (), False, {}, 100).render(make_example("2 + 2 ="), tiny.tokenizer)
    assert text == "2 + 2 ="


def test_options_reach_the_chat_template(tiny: LanguageModel) -> None:
    tiny.tokenizer.chat_template = "{{ messages[-1].content }}{{ ' /think' if thinking }}"
    format = PromptFormat(None, (), True, {"thinking": True}, 100)
    assert format.render(make_example("2+2?"), tiny.tokenizer)[0] == "2+2? /think"


def test_a_column_may_hold_a_chat(tiny: LanguageModel, tmp_path: Path) -> None:
    """The row's system prompt replaces the configured one; worked examples follow it."""
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "2+2?"},
    ]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"prompt": chat, "answer": "4"}) + "\n")
    source = Jsonl(str(tmp_path / "chats.jsonl"), question_column="prompt")
    example = Slices("train", ":", "train", ":").read_training_examples(source)[0]
    format = PromptFormat("Be brief.", (WorkedExample("1+1?", "2"),), True, {}, 100)
    assert [m["content"] for m in format.build_messages(example)] == [
        "Be kind.", "1+1?", "2", "Hello", "Hello!", "2+2?",
    ]  # fmt: skip
    assert example.question.endswith("Hello!\n\n2+2?")


@pytest.mark.parametrize(
    ("chat", "says"),
    [
        ([{"role": "user"}], "are not all messages"),
        (["hello"], "are not all messages"),
        ([{"role": "assistant", "content": "Hello!"}], "leaves nothing to answer"),
    ],
)
def test_a_column_with_a_broken_chat_is_refused(chat: object, says: str, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text(json.dumps({"prompt": chat, "answer": "4"}) + "\n")
    source = Jsonl(str(tmp_path / "chats.jsonl"), question_column="prompt")
    with pytest.raises(ConfigError, match=says):
        Slices("train", ":", "train", ":").read_training_examples(source)


@pytest.mark.parametrize(
    ("text", "boxed", "likely"),
    [
        (r"so \boxed{72}.", "72", "72"),
        (r"\boxed{\frac{1}{2}} it is", r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"\boxed{1} or \boxed{2}", "2", "2"),
        (r"\boxed{1", None, "1"),
        (r"\boxed{5} <answer>6</answer>", "5", "6"),
        ("it is 7, I think", None, "7"),
        ("red", None, "red"),
        ("  ", None, None),
    ],
)
def test_answers_in_boxes_and_wherever_they_stand(
    text: str, boxed: str | None, likely: str | None
) -> None:
    assert extract_boxed_answer(text) == boxed
    assert extract_likely_answer(text) == likely


def test_a_mix_draws_its_sets_by_probability_and_each_row_once_an_epoch() -> None:
    """0.7 and 0.3 of 4,000 draws; each set has its own epochs, with each row once."""
    sources = ["a"] * 10 + ["b"] * 30
    order = order_mix(sources, {"a": 0.7, "b": 0.3}, seed=0)
    drawn = [row for step in range(1, 401) for row in order.draw_batch(step, 10)]
    first = [row for row in drawn if row < 10]
    assert abs(len(first) - 2800) < 4 * (4000 * 0.21) ** 0.5
    assert all(sorted(first[k : k + 10]) == list(range(10)) for k in range(0, 2000, 10))
    second = [row for row in drawn if row >= 10]
    assert sorted(second[:30]) == list(range(10, 40))
    # Any step can be computed directly, also after the first block of draws.
    assert order_mix(sources, {"a": 0.7, "b": 0.3}, seed=0).draw_batch(300, 10) == drawn[2990:3000]


def test_a_given_order_is_kept_and_what_is_drawn_anew_is_not() -> None:
    order = order_one_set(40, seed=0, shuffled=False)
    assert order.draw_batch(1, 3) + order.draw_batch(14, 2) == [0, 1, 2, 26, 27]
    stale = order.draw_batch(1, 3)
    draws = [
        order.draw_replacements(step, attempt, stale) for step, attempt in ((1, 0), (1, 1), (2, 0))
    ]
    assert len({tuple(draw) for draw in draws}) == 3
    assert not set(draws[0]) & set(stale)
    assert draws[0] == order.draw_replacements(1, 0, stale)


def test_what_is_drawn_anew_is_of_the_same_set_however_large_the_seed() -> None:
    order = order_mix(["a"] * 10 + ["b"] * 10, {"a": 0.5, "b": 0.5}, seed=2**31)
    drawn = order.draw_replacements(1, 0, [1, 2, 15])
    assert [row < 10 for row in drawn] == [True, True, False]
    assert not set(drawn) & {1, 2, 15}
    assert len(order.draw_batch(1, 8)) == 8
    # With fewer rows than are needed, some come again.
    assert len(order_one_set(2, seed=0).draw_replacements(1, 0, [0, 1, 0])) == 3


@given(st.integers(1, 60), st.integers(1, 12), st.booleans(), st.integers(0, 2**40))
def test_a_step_has_no_row_twice_while_there_are_others(
    rows: int, batch: int, apart: bool, seed: int
) -> None:
    """Five attempts replace all rows of the step; with one set, and with two that alternate."""
    order = order_one_set(rows, seed)
    if apart:
        order = order_mix(["a", "b"] * rows, {"a": 0.5, "b": 0.5}, seed)
    first = order.draw_batch(3, batch)
    had, places = set(first), Counter(row % 2 if apart else 0 for row in first)
    for attempt in range(5):
        drawn = order.draw_replacements(3, attempt, first, had)
        assert drawn == order.draw_replacements(3, attempt, first, frozenset(had))
        assert Counter(row % 2 if apart else 0 for row in drawn) == places
        for row_set in order.sets:
            in_set = [row for row in drawn if row in row_set]
            left = len(row_set) - sum(row in row_set for row in had)
            assert len(set(in_set) - had) == min(left, len(in_set))  # new ones, and different
        had |= set(drawn)


def format_lines(count: int) -> list[str]:
    return [json.dumps({"question": f"What is {n} + 1? ☃", "answer": n + 1}) for n in range(count)]


@pytest.fixture
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes data sets of more than a dozen rows lazy, as those of millions are."""
    for module in ("source", "files", "hub_rows"):
        monkeypatch.setattr(f"grpo.data.{module}.MAX_EAGER_ROWS", 12)
    monkeypatch.setattr("grpo.build.data.MAX_EAGER_ROWS", 12)


@pytest.mark.usefixtures("few_are_many")
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arithmetic", "gym"])
def test_rows_on_demand_are_the_rows(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lazy rows equal eager ones, by any index or range, with blank lines in the file."""
    lines = format_lines(40)
    (tmp_path / "x.jsonl").write_text("\n".join([*lines[:9], "", "  ", *lines[9:]]) + "\n\n")
    rows = [json.loads(line) for line in lines]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    source: Source = {
        "jsonl": lambda: Jsonl(str(tmp_path / "x.jsonl")),
        "parquet": lambda: Jsonl(str(tmp_path / "x.parquet")),
        "arithmetic": lambda: Arithmetic(40, 8, digits=1),
        "gym": lambda: ReasoningGym("chain_sum", 40, 8, {}),
    }[kind]()
    slices = Slices("train", "5:35", "train", "35:")
    lean = slices.read_training_examples(source)
    assert isinstance(lean, Examples)
    monkeypatch.setattr("grpo.data.source.MAX_EAGER_ROWS", 10**9)
    whole = slices.read_training_examples(source)
    assert isinstance(whole, list)

    def list_fields(example: Example) -> tuple[object, ...]:
        return example.question, example.answer, example.columns

    assert len(lean) == len(whole) == 30
    assert [list_fields(lean[n]) for n in (29, 0, 17, -1)] == [
        list_fields(whole[n]) for n in (29, 0, 17, 29)
    ]
    assert list(map(list_fields, lean)) == list(map(list_fields, whole))
    gone = {whole[3].question, whole[20].question, "another"}
    left = [
        list_fields(example)
        for example in whole
        if kind in ("arithmetic", "gym") or example.question not in gone
    ]
    assert list(map(list_fields, lean.drop_questions(gone))) == left


@pytest.mark.usefixtures("few_are_many")
@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{oh", "line 31 is not JSON"),
        ('{"question": "q", "answer": " "}', "row 30 has nothing in column 'answer'"),
        ('{"question": "q"}', "row 30 has no such column"),
        (b'{"question": "\xff", "answer": 1}', "line 31 is not UTF-8"),
    ],
)
def test_a_bad_row_among_many_is_refused_with_its_number(
    bad: str | bytes, says: str, tmp_path: Path
) -> None:
    lines: list[str | bytes] = ["", *format_lines(40)]  # the first line is blank
    lines[30] = bad
    encoded = [line if isinstance(line, bytes) else line.encode() for line in lines]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(encoded))
    with pytest.raises(ConfigError, match=says):
        Slices("train", ":38", "test", "38:").read_training_examples(
            Jsonl(str(tmp_path / "x.jsonl"))
        )


@pytest.mark.usefixtures("few_are_many")
def test_prompts_made_as_they_are_drawn_are_those_made_beforehand(
    tiny: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    long = "long " * 60
    train = [f"{long if n % 4 == 0 else ''}{n}?" for n in range(40)]
    drawn = make_prompts(Rows(train, train[-3:]), tiny.tokenizer, max_prompt_tokens=60).train
    assert isinstance(drawn, LazyPrompts)
    assert "3 training rows are evaluation rows too" in caplog.text
    assert len(drawn) == 37  # without the evaluation's; prompts that are too long are not known yet
    fitting = [row for row in range(37) if drawn.fits(row)]
    assert [drawn[row].example.question for row in fitting] == [q for q in train[:37] if len(q) < 9]
    format = PromptFormat(None, (), True, {}, 60)
    assert drawn[5].token_ids == format.render(drawn[5].example, tiny.tokenizer)[1]
    assert "8 training prompts so far are too long" in caplog.text
    with pytest.raises(ConfigError, match="so none is left"):
        drawn.check_lengths(3)


def test_replacements_of_a_million_rows_are_drawn_in_no_time() -> None:
    order = order_mix(["a"] * 600_000 + ["b"] * 400_000, {"a": 0.5, "b": 0.5}, seed=0)
    stale = order.draw_batch(1, 64)
    begun = time.perf_counter()
    drawn = [order.draw_replacements(1, attempt, stale, stale) for attempt in range(100)]
    assert time.perf_counter() - begun < 0.5  # a pass over the rows takes a second each
    assert len({row for batch in drawn for row in batch}) > 6000
    assert sum(sys.getsizeof(row_set) for row_set in order.sets) < 1000


def test_an_answer_that_a_tasks_scorer_cannot_read_is_wrong() -> None:
    """This task's scorer converts the answer to a whole number."""
    source = ReasoningGym("prime_factorization", size=2, eval_size=2, options={})
    example = EVERYTHING.read_training_examples(source)[0]
    assert example.verify("<answer>I don't know</answer>") == 0.0
    assert example.lenient is not None
    assert example.lenient("I don't know") == 0.0
    assert example.verify(f"<answer>{example.answer}</answer>") == 1.0
