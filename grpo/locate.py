"""Finds the rows and model files of a run without torch.

A missing file, a row without an answer or an unreachable hub is therefore reported within seconds,
before anything heavy is imported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from grpo.config.binding import bind, resolve_node
from grpo.config.validation import check_at_least
from grpo.data.source import Slices, Source
from grpo.errors import ConfigError
from grpo.models.files import check_reachable, find_model_folder
from grpo.models.hub import read_commit
from grpo.runs.folder import locate_checkpoint_model
from grpo.types import Example

SLICE_KEYS = ("split", "slice", "eval_split", "eval_slice")
PROMPT_KEYS = (
    "system_prompt",
    "worked_examples",
    "chat",
    "template_options",
    "max_prompt_tokens",
    "allow_overlap",
)


@dataclass(frozen=True)
class ExampleSet:
    """The rows of one data set, and its config."""

    key: str  # where that is: dataset, or dataset.sets.NAME
    name: str  # empty where it is the only one
    probability: float
    train: Sequence[Example]
    evaluation: list[Example]
    options: DictConfig
    commit: str | None = None  # of the hub, that the rows are from


@dataclass(frozen=True)
class RunInputs:
    """The rows and the model that a run starts from."""

    sets: list[ExampleSet]
    model: Callable[[], Path]  # its folder; the call downloads it where need be

    def find_hub_commits(self) -> dict[str, str]:
        """Returns the commits of what came from the hub, by config key; {} without the hub."""
        commits = {
            "model": read_commit(self.model()),
            **{part.key: part.commit for part in self.sets},
        }
        return {key: commit for key, commit in commits.items() if commit is not None}


def find_for_training(cfg: DictConfig) -> RunInputs:
    """Finds what a training run needs; raises ConfigError if rows or model can't be had."""
    sets = find_sets(cfg, training=True)
    return RunInputs(sets, locate_model(cfg.model))


def locate_model(model: DictConfig) -> Callable[[], Path]:
    """Returns a function that returns the model's folder, and downloads it if necessary.

    Raises:
        ConfigError: the model can't be had.
    """
    options = resolve_node(model)
    keys = ("id", "path", "packaged", "wheel", "revision", "trust_remote_code")
    where = {key: options[key] for key in keys}
    where["name"] = f"model={options['name']}"
    check_reachable(**where)
    return functools.partial(find_model_folder, **where)


def find_for_evaluation(cfg: DictConfig) -> RunInputs:
    """Finds what an evaluation needs; raises ConfigError if rows or checkpoint can't be had."""
    if cfg.checkpoint is None:
        raise ConfigError(
            "checkpoint is not set: grpo eval checkpoint=DIR, a run's or a model's.",
            key="checkpoint",
        )
    sets = find_sets(cfg, training=False)
    model = cfg.model
    found = locate_checkpoint_model(str(cfg.checkpoint), model.revision, model.trust_remote_code)
    return RunInputs(sets, found)


def find_sets(cfg: DictConfig, *, training: bool) -> list[ExampleSet]:
    """Returns the rows of the data set, or of each set of a mix."""
    if "sets" not in cfg.dataset:
        return [find_set(cfg.dataset, "dataset", "", 1.0, training=training)]
    sets = cfg.dataset.sets
    for key in cfg.dataset:
        if key != "sets":
            raise ConfigError(f"dataset.{key}: a mix has sets alone; give it to dataset.sets.NAME.")
    for name, options in sets.items():
        if not isinstance(options, DictConfig) or "_target_" not in options:
            raise ConfigError(
                f"dataset.sets.{name}: is no data set; bring one in by defaults: "
                f"/dataset@sets.{name}: arithmetic"
            )
        if "probability" not in options:
            raise ConfigError(f"dataset.sets.{name}.probability is not set.")
        check_at_least(cfg, f"dataset.sets.{name}.probability", 0.0)
    chosen = {str(name): options for name, options in sets.items() if options.probability > 0}
    if not chosen:
        raise ConfigError("dataset.sets: none has a probability above 0.", key="dataset.sets")
    return [
        find_set(options, f"dataset.sets.{name}", name, options.probability, training=training)
        for name, options in chosen.items()
    ]


def find_set(
    options: DictConfig, key: str, name: str, probability: float, *, training: bool
) -> ExampleSet:
    source = build_source(options, key)
    slices = Slices(**{key: str(options[key]) for key in SLICE_KEYS})
    if name:
        source = NamedSource(source, name)
    train = slices.read_training_examples(source) if training else []
    evaluation = slices.read_evaluation_examples(source)
    return ExampleSet(key, name, probability, train, evaluation, options, source.commit)


class NamedSource(Source):
    """A set of a mix, whose examples name the set."""

    def __init__(self, source: Source, name: str) -> None:
        self.source, self.name = source, name

    @property
    def commit(self) -> str | None:
        return self.source.commit

    def rows(self, split: str) -> Sequence[Any]:
        return self.source.rows(split)

    def example(self, row: Any, number: int) -> Example:
        return replace(self.source.example(row, number), source=self.name)


def build_source(options: DictConfig, key: str) -> Source:
    apart = (*SLICE_KEYS, *PROMPT_KEYS, *(["probability"] if key != "dataset" else []))
    source_keys = [str(option) for option in options if option not in apart]
    source = bind(OmegaConf.masked_copy(options, source_keys), key)()
    if not isinstance(source, Source):
        raise ConfigError(
            f"{key}._target_={options._target_}: is no grpo.data.source.Source.",
            key=f"{key}._target_",
            value=options._target_,
        )
    return source
