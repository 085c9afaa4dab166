"""`grpo chat RUN_OR_MODEL`: the base and the trained model answer side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from grpo.errors import ConfigError
from grpo.runs.folder import find_run, locate_checkpoint_model
from grpo.runs.resume import read_yaml

if TYPE_CHECKING:
    from grpo.data.prompts import PromptFormat
    from grpo.models.load import LanguageModel

USAGE = "grpo chat RUN_OR_MODEL [temperature=0] [max_new_tokens=256] [--trust]"
COMMANDS = "/reset begins anew, /temperature 0.7 sets it, /quit or Ctrl-D ends"
NARROW_WIDTH = 90  # columns: below, answers stand under each other


@dataclass
class ChatModel:
    """One of the models that answer, and its conversation so far."""

    name: str
    model: LanguageModel
    turns: list[dict[str, str]] = field(default_factory=list)


@dataclass
class ChatOptions:
    temperature: float = 0.0
    max_new_tokens: int = 256


def chat(arguments: Sequence[str]) -> None:
    """Reads questions, from the terminal or a pipe, and prints every model's answer.

    Raises:
        ConfigError: there is no such run or model.
    """
    trusted = "--trust" in arguments
    places = [word for word in arguments if "=" not in word and word != "--trust"]
    if len(places) != 1:
        raise ConfigError(f"{USAGE}: name one run or model.")
    options = parse_options([argument for argument in arguments if "=" in argument])
    console = Console()
    prompt_format, voices = load_chat_models(places[0], trusted)
    talking = sys.stdin.isatty()
    if talking:
        names = " and ".join(voice.name for voice in voices)
        console.print(f"{names}; {COMMANDS}", style="dim", markup=False)
    while True:
        try:
            said = console.input("\n> ") if talking else next(sys.stdin)
        except (EOFError, StopIteration):
            return
        said = said.strip()
        if said in ("/quit", "/exit"):
            return
        if said == "/reset":
            for voice in voices:
                voice.turns.clear()
        elif said.startswith("/"):
            console.print(run_command(said, options), style="dim", markup=False)
        elif said:
            print_answers(
                console,
                [
                    (voice.name, generate_answer(voice, said, prompt_format, options))
                    for voice in voices
                ],
            )


def parse_options(given: Sequence[str]) -> ChatOptions:
    """Reads the options; raises ConfigError for an unknown one."""
    options = ChatOptions()
    for one in given:
        key, _, value = one.partition("=")
        try:
            if key == "temperature" and float(value) >= 0:
                options.temperature = float(value)
            elif key == "max_new_tokens" and int(value) >= 1:
                options.max_new_tokens = int(value)
            else:
                raise ConfigError(f"{one}: {USAGE}")
        except ValueError as error:
            raise ConfigError(f"{one}: should be a number.") from error
    return options


def run_command(command: str, options: ChatOptions) -> str:
    """Carries out a command of the chat, and returns what to print."""
    name, _, value = command.partition(" ")
    if name != "/temperature":
        return COMMANDS
    try:
        options.temperature = max(0.0, float(value))
    except ValueError:
        return f"{value}: should be a number."
    return f"temperature {options.temperature:g}"


def load_chat_models(place: str, trusted: bool) -> tuple[PromptFormat, list[ChatModel]]:
    """Loads the models, a run's base model first; returns the prompt format and the models.

    Args:
        trusted: whether Python code that comes with them may be run, whatever the run says.
    """
    folder = locate_checkpoint_model(place, trust_remote_code=trusted)()  # refused before torch
    from grpo.data.prompts import PromptFormat
    from grpo.device import open_device
    from grpo.models.load import load_language_model

    device = open_device("auto", "auto")
    run = find_run(Path(place).expanduser())
    if run is None:
        plain = PromptFormat(None, (), True, {}, 2**20)
        model = load_language_model(folder, device, frozen=True, trust_remote_code=trusted)
        return plain, [ChatModel(place, model)]
    from grpo.build.data import build_prompt_format
    from grpo.build.model import load_model
    from grpo.locate import locate_model

    cfg = OmegaConf.create(read_yaml(run / ".hydra" / "config.yaml") or {})
    # An older run's has no revision.
    cfg.model = {"revision": None, **cfg.model, "trust_remote_code": trusted}
    data, key = cfg.dataset, "dataset"
    if "sets" in data:
        name, data = next(iter(data.sets.items()))
        key = f"dataset.sets.{name}"
    return build_prompt_format(data, key), [
        ChatModel(
            f"base: {cfg.model.name}",
            load_model(cfg, locate_model(cfg.model)(), device, frozen=True),
        ),
        ChatModel(f"trained: {place}", load_model(cfg, folder, device, frozen=True)),
    ]


def generate_answer(
    chat_model: ChatModel, question: str, prompt_format: PromptFormat, options: ChatOptions
) -> str:
    """Generates a model's answer; with a chat template, the conversation so far is the prompt."""
    import torch

    from grpo.types import Example

    model, tokenizer = chat_model.model.model, chat_model.model.tokenizer
    if tokenizer.chat_template is None:
        chat_model.turns.clear()
    chat_model.turns.append({"role": "user", "content": question})
    asked = Example(question, "", lambda _: 0.0, messages=tuple(chat_model.turns))
    _, ids = prompt_format.render(asked, tokenizer)
    room = min(options.max_new_tokens, chat_model.model.context_length - len(ids))
    if room < 1:
        chat_model.turns.clear()
        return "(this chat is longer than the model can read; it begins anew)"
    tokens = torch.tensor([ids], device=chat_model.model.device.torch_device)
    warm = {"do_sample": True, "temperature": options.temperature, "top_k": 0}
    with torch.no_grad(), chat_model.model.device.autocast():
        written = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=room,
            eos_token_id=list(chat_model.model.end_ids), pad_token_id=chat_model.model.pad_id,
            **(warm if options.temperature else {"do_sample": False}),
        )  # fmt: skip
    text = chat_model.model.decoder.decode_tokens(written[0, len(ids) :].tolist())
    chat_model.turns.append({"role": "assistant", "content": text})
    return text


def print_answers(console: Console, answers: Sequence[tuple[str, str]]) -> None:
    panels = [Panel(Text(text or "(nothing)"), title=Text(name)) for name, text in answers]
    if console.width < NARROW_WIDTH:
        for panel in panels:
            console.print(panel)
        return
    table = Table.grid(expand=True)
    for _ in panels:
        table.add_column(ratio=1)
    table.add_row(*panels)
    console.print(table)
