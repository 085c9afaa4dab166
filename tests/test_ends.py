"""Tests where prompts begin and completions end, and what their text is, for many tokenizers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from grpo.data.prompts import PromptFormat
from grpo.device import Device
from grpo.errors import ConfigError
from grpo.memory.budget import Budget
from grpo.models.files import PACKAGE_FOLDER
from grpo.models.load import load_language_model
from grpo.rollout import Engine, HFEngine, NativeEngine
from grpo.tracking.tokens import find_token_ends
from grpo.types import Example, Prompt, Sampling

TINY = PACKAGE_FOLDER / "tiny"
TEXT_END, TURN_BEGIN, TURN_END = 0, 1, 2  # <|endoftext|> <|im_start|> <|im_end|>
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
UNENDED = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
ENDED_BY_TEXT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} <|endoftext|>{% endfor %}"
)
RAISES = "{{ raise_exception('no talking') }}"


def write_edited_model(
    folder: Path,
    configs: dict[str, dict[str, Any]],
    template: str | None = None,
    tokenizer: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Path:
    """Writes the tiny model with other values in its files; a value of None removes the key."""
    shutil.copytree(TINY, folder)
    for name, values in configs.items():
        file = folder / f"{name}.json"
        content = {**json.loads(file.read_text()), **values}
        file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    content = json.loads((folder / "tokenizer.json").read_text())
    tokenizer(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


GENERATION, CONFIG, TOKENIZER = "generation_config", "config", "tokenizer_config"
OWN = {"_from_model_config": None}  # makes transformers read the file's values
WORD = 65  # an ordinary token


@pytest.mark.parametrize(
    ("configs", "template", "ends"),
    [
        ({}, None, {TURN_END}),
        # Every source that names an end token counts.
        ({GENERATION: {**OWN, "eos_token_id": 0}, CONFIG: {"eos_token_id": 0}}, UNENDED, {0, 2}),
        ({GENERATION: {**OWN, "eos_token_id": [0, WORD, 0]}}, UNENDED, {0, 2, WORD}),
        ({TOKENIZER: {"eos_token": "<|endoftext|>"}}, UNENDED, {0, 2}),
        # Only the template writes an end of turns, or it writes none, or it can't be rendered.
        (
            {
                GENERATION: {"eos_token_id": 0},
                CONFIG: {"eos_token_id": 0},
                TOKENIZER: {"eos_token": "<|endoftext|>"},
            },
            TURNS,
            {0, 2},
        ),
        ({TOKENIZER: {"eos_token": None}, CONFIG: {"eos_token_id": 2}}, ENDED_BY_TEXT, {0, 2}),
        ({}, RAISES, {TURN_END}),
        # A class's default may be any word of this vocabulary; ids outside of it end nothing.
        ({GENERATION: {"eos_token_id": WORD}, CONFIG: {"eos_token_id": WORD}}, UNENDED, {2}),
        ({GENERATION: {**OWN, "eos_token_id": 50256}}, UNENDED, {2}),
        ({GENERATION: {"eos_token_id": None}, CONFIG: {"eos_token_id": None}}, UNENDED, {2}),
    ],
)
def test_every_end_that_is_named_ends_a_completion(
    configs: dict[str, dict[str, Any]],
    template: str | None,
    ends: set[int],
    tmp_path: Path,
    device: Device,
) -> None:
    model = load_language_model(write_edited_model(tmp_path / "m", configs, template), device)
    assert set(model.end_ids) == ends
    assert len(model.end_ids) == len(ends)


def test_a_model_that_names_no_end_is_refused(tmp_path: Path, device: Device) -> None:
    nothing = {name: {"eos_token_id": None} for name in (GENERATION, CONFIG)}
    folder = write_edited_model(tmp_path / "m", nothing, UNENDED)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": None}))
    with pytest.raises(ConfigError, match="name an end-of-sequence token"):
        load_language_model(folder, device)


def test_a_model_that_can_write_no_end_says_so(
    tmp_path: Path, device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    """The vocabulary has 319 tokens, 0 to 318, and the end token is 319."""

    def write_model(name: str, pad: str | None) -> Path:
        beyond = {name: {"eos_token_id": 319} for name in (GENERATION, CONFIG)}
        model_folder = write_edited_model(tmp_path / name, beyond, UNENDED)
        file = model_folder / "tokenizer_config.json"
        tokens = {"eos_token": None, "pad_token": pad}
        file.write_text(json.dumps({**json.loads(file.read_text()), **tokens}))
        return model_folder

    assert load_language_model(write_model("padded", "<|im_end|>"), device).end_ids == (319,)
    assert "no token that ends a completion" in caplog.text
    with pytest.raises(ConfigError, match="name an end-of-sequence token"):
        load_language_model(write_model("bare", None), device)


def render_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> Prompt:
    example = Example(text, "", lambda _: 0.0)
    return Prompt(*PromptFormat(None, (), True, {}, 512).render(example, tokenizer), example)


@pytest.mark.parametrize("engine", [NativeEngine, HFEngine])
def test_special_tokens_stay_in_the_text_but_for_its_end(
    engine: Callable[..., Engine], tmp_path: Path, device: Device
) -> None:
    """Makes digits special tokens: the tiny model's completions keep the same text with digits."""

    def make_digits_special(content: dict[str, Any]) -> None:
        for digit in "0123456789":
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            id = content["model"]["vocab"][digit]
            content["added_tokens"].append({"id": id, "content": digit, "special": True, **flags})
        content["added_tokens"].sort(key=lambda token: token["id"])

    plain = load_language_model(TINY, device)
    special = load_language_model(
        write_edited_model(tmp_path / "m", {}, None, make_digits_special), device
    )
    assert set(special.tokenizer.encode("12")) <= set(special.tokenizer.all_special_ids) or (
        special.tokenizer.decode(special.tokenizer.encode("12"), skip_special_tokens=True) == ""
    )
    texts = []
    for model in (plain, special):
        prompts = [render_prompt(model.tokenizer, "What is 3 + 4?")]
        rollout = engine(model, 40, Budget.from_tokens(4096)).generate(
            prompts, 4, Sampling(1.0), seed=1
        )
        assert not rollout.truncated_N.any()
        texts.append(rollout.texts)
        for text, tokens, length in zip(
            rollout.texts, rollout.tokens_NC.tolist(), rollout.lengths_N.tolist(), strict=True
        ):
            assert "<|" not in text
            assert find_token_ends(model.decoder, tokens[:length], text)[-1] == len(text)
        stop = Sampling(1.0, stop=("7",))
        stopped = engine(model, 40, Budget.from_tokens(4096)).generate(prompts, 2, stop, seed=1)
        assert all(text.count("7") <= 1 for text in stopped.texts)
        assert any(text.endswith("7") for text in stopped.texts)
    assert texts[0] == texts[1]
    assert any(character.isdigit() for text in texts[0] for character in text)


def test_what_a_text_shows(tmp_path: Path, device: Device) -> None:
    """The text shows a token that begins a turn, and an end token that is an ordinary word."""
    ends = {GENERATION: {**OWN, "eos_token_id": [TURN_END, WORD]}}
    model = load_language_model(write_edited_model(tmp_path / "m", ends), device)
    word = model.tokenizer.decode([WORD])
    ids = [TURN_BEGIN, WORD, TURN_END, TEXT_END, TEXT_END]
    assert model.decoder.decode_tokens(ids) == f"<|im_start|>{word}"
    assert model.decoder.decode_batch([[], [TURN_END]]) == ["", ""]


def make_edit(before: tuple[int, ...], behind: tuple[int, ...]) -> Callable[[dict[str, Any]], None]:
    """Edits a tokenizer so that it puts special tokens before and after every text."""
    names = {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>"}

    def edit(content: dict[str, Any]) -> None:
        special = [{"SpecialToken": {"id": names[id], "type_id": 0}} for id in (*before, *behind)]
        text = {"Sequence": {"id": "A", "type_id": 0}}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [*special[: len(before)], text, *special[len(before) :]],
            "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                names[id]: {"id": names[id], "ids": [id], "tokens": [names[id]]}
                for id in {*before, *behind}
            },
        }

    return edit


@pytest.mark.parametrize("before", [(), (TEXT_END,), (TURN_BEGIN, TEXT_END)])
@pytest.mark.parametrize("behind", [(), (TURN_END,), (TURN_END, TEXT_END)])
@pytest.mark.parametrize("text", ["What is 8 - 3?", "<|endoftext|>What", "ends <|im_end|>"])
def test_a_prompt_is_begun_once_and_not_ended(
    before: tuple[int, ...], behind: tuple[int, ...], text: str, tmp_path: Path
) -> None:
    begin = {TOKENIZER: {"bos_token": "<|endoftext|>"}}
    template = "{{ bos_token }}{{ messages[0]['content'] }}"
    folder = write_edited_model(tmp_path / "m", begin, template, make_edit(before, behind))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text_ids = AutoTokenizer.from_pretrained(TINY).encode(text)
    for chat in (False, True):
        example = Example(text, "", lambda _: 0.0)
        _, ids = PromptFormat(None, (), chat, {}, 512).render(example, tokenizer)
        begins = [TEXT_END] if chat else list(before)
        if text_ids[0] == TEXT_END and begins[-1:] == [TEXT_END]:
            begins = begins[:-1]
        assert list(ids) == [*begins, *text_ids]


PARTS = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('roles are user and assistant') }}"
    "{% endif %}" + TURNS
)


@pytest.mark.parametrize(
    ("template", "system", "reason"),
    [
        (NO_SYSTEM, "Be brief.", r"data\.system_prompt: .*roles are user.*system_prompt=null"),
        (PARTS, None, r"data\.chat=true: .*leaves the question out.*data\.chat=false"),
        ("{{ messages[0].content.parts[0] }}", None, r"data\.chat=true: .*data\.chat=false"),
        ("{% for %}", None, r"data\.chat=true: .*can't be rendered"),
    ],
)
def test_a_template_that_refuses_a_chat_is_refused_by_key(
    template: str, system: str | None, reason: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=reason) as refused:
        PromptFormat(system, (), True, {}, 99).render(
            Example("What is 1 + 1?", "2", float), tokenizer, "data"
        )
    assert "\n" not in str(refused.value)


def test_one_of_several_templates_is_chosen_by_name() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = {"quiet": TURNS, "loud": TURNS + "!"}
    example = Example("Who?", "", float)
    with pytest.raises(ConfigError, match=r"\+dataset\.template_options\.chat_template=NAME.*loud"):
        PromptFormat(None, (), True, {}, 99).render(example, tokenizer)
    chosen = PromptFormat(None, (), True, {"chat_template": "loud"}, 99)
    assert chosen.render(example, tokenizer)[0].endswith("<|im_end|>\n!")
