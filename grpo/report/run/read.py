"""A run, read from its folder alone; one that is still going is read as far as it has come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grpo.config.schema import DoctorConfig, flatten_config
from grpo.config.secrets import find_environment_texts, hide_texts
from grpo.doctor.diagnoses import Diagnosis, diagnose
from grpo.errors import ConfigError
from grpo.runs.files import read_summary
from grpo.runs.jsonl import read_lines
from grpo.runs.resume import read_yaml

NOT_COMPARED = ("hydra", "sweep_dir", "resume", "name")


@dataclass(frozen=True)
class Run:
    """What is known of a run."""

    name: str
    folder: Path
    overrides: list[str]
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    lines: list[dict[str, Any]]  # of metrics.jsonl
    completions: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]  # of evaluations.jsonl: greedy answers
    diagnoses: list[Diagnosis]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "time/step" in line]

    def series(self, metric: str) -> tuple[list[int], list[float | None]]:
        """Steps and values of a metric, where it was logged; null where it was no number."""
        own = [line for line in self.lines if metric in line]
        return [line["step"] for line in own], [line[metric] for line in own]

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(key for line in self.lines for key in line if key != "step"))


def is_run(folder: Path) -> bool:
    return (folder / ".hydra" / "config.yaml").is_file()


def read_run(folder: Path) -> Run:
    """Raises ConfigError where there is no run, or one that hasn't done a step."""
    config = read_yaml(folder / ".hydra" / "config.yaml")
    if config is None:
        raise ConfigError(f"{folder}: holds no run (.hydra/config.yaml is not there).")
    lines = read_lines(folder / "metrics.jsonl")
    if not lines:
        raise ConfigError(f"{folder}: this run has logged nothing yet.")
    config = resolve_config(config)
    return Run(
        name=str(config.get("name") or folder.absolute().name),
        folder=folder,
        overrides=list(read_yaml(folder / ".hydra" / "overrides.yaml") or []),
        config=config,
        summary=read_summary(folder) or {},
        lines=lines,
        completions=read_lines(folder / "completions.jsonl"),
        evaluations=read_lines(folder / "evaluations.jsonl"),
        diagnoses=diagnose_run(lines, config),
    )


def diagnose_run(lines: list[dict[str, Any]], config: Mapping[str, Any]) -> list[Diagnosis]:
    """What the doctor says of a run, by the limits in its config; nothing at doctor=none."""
    limits = config.get("doctor")
    return diagnose(lines, config, DoctorConfig(**limits)) if limits else []


def make_names_unique(runs: Sequence[Run]) -> list[Run]:
    """The same, those that share a name with where they lie behind it."""
    counts = Counter(run.name for run in runs)
    return [
        replace(run, name=f"{run.name} ({run.folder})") if counts[run.name] > 1 else run
        for run in runs
    ]


def resolve_config(config: Any) -> dict[str, Any]:
    """The config with what its keys refer to in their place, and without what is not compared.

    Texts of the environment stay as they are written.
    """
    content = OmegaConf.create({k: v for k, v in config.items() if k != "hydra"})
    written, made = OmegaConf.to_container(content), resolve_values(content)
    made = hide_texts(written, made, set(find_environment_texts(written, made)))
    return {key: value for key, value in made.items() if key == "name" or key not in NOT_COMPARED}


def resolve_values(config: DictConfig) -> dict[str, Any]:
    """What can't be known any more, as ${now:…} may be, stays as it was written."""
    found: dict[str, Any] = {}
    written: Any = OmegaConf.to_container(config)
    for key in config:
        try:
            value = config[key]
            if isinstance(value, ListConfig):
                value = OmegaConf.to_container(value, resolve=True)
        except OmegaConfBaseException:
            value = written[key]
        found[str(key)] = resolve_values(value) if isinstance(value, DictConfig) else value
    return found


def diff_configs(configs: list[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The keys in which configs differ, with the value in each; missing is null."""
    flats = [flatten_config(config) for config in configs]
    keys = dict.fromkeys(key for own in flats for key in own)
    values = {key: [own.get(key) for own in flats] for key in keys if key not in NOT_COMPARED}
    return {key: own for key, own in values.items() if any(value != own[0] for value in own)}


@cache
def load_default_config() -> dict[str, Any]:
    """The config of `grpo` without an override."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path
    from hydra.types import RunMode

    from grpo.config.schema import find_conf_folder, register_schema

    register_schema()
    loader = ConfigLoaderImpl(create_config_search_path(str(find_conf_folder())))
    config = loader.load_configuration("config", [], RunMode.RUN)
    content = {str(k): v for k, v in config.items_ex(resolve=False) if k != "hydra"}
    return resolve_config(content)
