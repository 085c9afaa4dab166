"""Reads a run from its folder alone; an unfinished run is read as far as it has come."""

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
    """What a run's folder holds."""

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
        """Returns the steps at which a metric was logged, and its values; None if not finite."""
        logged = [line for line in self.lines if metric in line]
        return [line["step"] for line in logged], [line[metric] for line in logged]

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(key for line in self.lines for key in line if key != "step"))


def is_run(folder: Path) -> bool:
    return (folder / ".hydra" / "config.yaml").is_file()


def read_run(folder: Path) -> Run:
    """Reads a run; raises ConfigError if there is none, or it has logged nothing yet."""
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
    """Returns the doctor's diagnoses, by the limits in the run's config; none with doctor=none."""
    limits = config.get("doctor")
    return diagnose(lines, config, DoctorConfig(**limits)) if limits else []


def make_names_unique(runs: Sequence[Run]) -> list[Run]:
    """Returns the runs; appends the folder to names that several runs share."""
    counts = Counter(run.name for run in runs)
    return [
        replace(run, name=f"{run.name} ({run.folder})") if counts[run.name] > 1 else run
        for run in runs
    ]


def resolve_config(config: Any) -> dict[str, Any]:
    """Resolves a config's references and drops the keys that are not compared.

    References to the environment stay as they are written.
    """
    content = OmegaConf.create({k: v for k, v in config.items() if k != "hydra"})
    written, found = OmegaConf.to_container(content), resolve_values(content)
    found = hide_texts(written, found, set(find_environment_texts(written, found)))
    return {key: value for key, value in found.items() if key == "name" or key not in NOT_COMPARED}


def resolve_values(config: DictConfig) -> dict[str, Any]:
    """Resolves references; one that can't be resolved, as ${now:…} may be, stays as written."""
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
    """Returns the keys in which configs differ, with each config's value; missing is None."""
    flats = [flatten_config(config) for config in configs]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    found = {key: [flat.get(key) for flat in flats] for key in keys if key not in NOT_COMPARED}
    return {key: values for key, values in found.items() if any(v != values[0] for v in values)}


@cache
def load_default_config() -> dict[str, Any]:
    """Returns the config of `grpo` without overrides."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path
    from hydra.types import RunMode

    from grpo.config.schema import find_conf_folder, register_schema

    register_schema()
    loader = ConfigLoaderImpl(create_config_search_path(str(find_conf_folder())))
    config = loader.load_configuration("config", [], RunMode.RUN)
    content = {str(k): v for k, v in config.items_ex(resolve=False) if k != "hydra"}
    return resolve_config(content)
