"""The typed schema of an experiment, and Hydra's door to it."""

from __future__ import annotations

import copy
import difflib
import math
import os
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.experimental.callback import Callback
from omegaconf import MISSING, DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from grpo.doctor.limits import Limits
from grpo.errors import ConfigError
from grpo.runs import folder as past


@dataclass
class ModelConfig:
    """Where a model is: exactly one of id, path and packaged."""

    name: str = MISSING
    id: str | None = None
    revision: str | None = None  # of an id: a branch, tag or commit; None is main
    path: str | None = None
    packaged: str | None = None
    wheel: dict[str, str] | None = None  # a GGUF on PyPI, for where the hub can't be reached
    trust_remote_code: bool = False  # run the Python code in the model's folder
    learning_rate: float = MISSING


@dataclass
class OptimConfig:
    name: str = MISSING
    schedule: str = MISSING
    warmup_steps: int = MISSING
    weight_decay: float = MISSING
    betas: list[float] = field(default_factory=list)
    max_grad_norm: float = MISSING


@dataclass
class EvalConfig:
    every: int = MISSING
    samples: int = MISSING
    temperature: float = MISSING
    greedy: bool = MISSING


@dataclass
class CurriculumConfig:
    order: str = MISSING
    samples: int = MISSING
    at_least: float = MISSING
    at_most: float = MISSING


@dataclass
class SamplingConfig:
    repetition_penalty: float = MISSING
    top_k: int = MISSING
    top_p: float = MISSING
    min_p: float = MISSING
    stop: list[str] = field(default_factory=list)


@dataclass
class AlgorithmConfig:
    """Names are of grpo.objective, or of functions of your own by their whole path."""

    policy_loss: dict[str, Any] = field(default_factory=dict)
    baseline: str = MISSING
    scale: str = MISSING
    aggregate: str = MISSING
    ratio: str = MISSING
    averaging: str = MISSING
    mask_truncated: bool = MISSING
    top_entropy: float = MISSING
    importance_cap: float = MISSING
    entropy_weight: float = MISSING
    num_iterations: int = MISSING
    minibatches: int = MISSING
    resample: int = MISSING
    kl_weight: float = MISSING
    kl_within: str = MISSING


@dataclass
class KLConfig:
    estimator: str | None = MISSING
    direction: str = MISSING
    within: str = MISSING
    unbiased_gradient: bool = MISSING
    target: float | None = MISSING
    horizon: int = MISSING
    sync_every: int = MISSING
    sync_share: float = MISSING


@dataclass
class DeviceConfig:
    kind: str = MISSING
    precision: str = MISSING
    memory_gb: float | None = None
    token_budget: int | None = None
    cache_budget: int | None = None
    gradient_checkpointing: bool = False


@dataclass
class AdapterConfig:
    rank: int = MISSING
    alpha: float = MISSING
    target: Any = MISSING
    rslora: bool = MISSING
    dora: bool = MISSING
    quantized: bool = MISSING


@dataclass
class Config:
    """conf/config.yaml, typed. Parts built from a `_target_` have their own parameters as keys."""

    name: str | None = None
    seed: int = MISSING
    num_epochs: int = MISSING
    max_steps: int | None = None
    batch_size: int = MISSING
    num_generation: int = MISSING
    max_new_tokens: int = MISSING
    temperature: float = MISSING
    kl_weight: float = MISSING
    learning_rate: float = MISSING
    log_prompts: int = MISSING
    objective: str = MISSING
    resume: str | None = None
    sweep_dir: str = MISSING
    checkpoint: Any = MISSING  # its keys in training, a folder in evaluation
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    dataset: dict[str, Any] = field(default_factory=dict)
    reward: dict[str, Any] = field(default_factory=dict)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    rollout: dict[str, Any] = field(default_factory=dict)
    tracking: dict[str, Any] = field(default_factory=dict)
    adapter: AdapterConfig | None = None
    doctor: Limits | None = None
    parallel: Any = None


def register() -> None:
    """Makes the schema and the resolvers known to Hydra; done once, when the command starts."""
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("pid", lambda: os.getpid(), replace=True)


def without_hydra(config: DictConfig) -> DictConfig:
    """The experiment's own config, its types with it."""
    own = copy.deepcopy(config)
    with flag_override(own, ["struct", "readonly"], [False, False]):
        own.pop("hydra", None)
    return own


def conf_folder() -> Path:
    """The project's configs: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean X or Y?`, or nothing where nothing is near."""
    alike = {choice: likeness(word, choice) for choice in choices}
    least = max(0.6, max(alike.values(), default=0.0) - 0.1)
    near = [choice for choice, own in alike.items() if own >= least]
    near = [own for own in near if "." not in own or own.rpartition(".")[2] not in near]
    near.sort(key=lambda choice: -alike[choice])
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""


def likeness(word: str, choice: str) -> float:
    """From 0 to 1; below 0.6 it is none. A key of another part counts a little less."""
    (part, _, name), (other_part, _, other) = word.rpartition("."), choice.rpartition(".")
    same_name = difflib.SequenceMatcher(None, other, name).ratio()
    if part == other_part:
        return same_name
    whole = difflib.SequenceMatcher(None, choice, word).ratio()
    return max(whole, 0.9 * same_name if same_name >= 0.75 else 0.0)


def at_least(
    cfg: DictConfig, key: str, least: float, *, whole: bool = False, optional: bool = False
) -> None:
    """optional: it may be null."""
    value = OmegaConf.select(cfg, key)
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        given = "null" if value is None else value
        raise ConfigError(f"{key}={given}: should be a {'whole ' if whole else ''}number.")
    if not (value >= least and math.isfinite(value)):
        raise ConfigError(f"{key}={value}: must be at least {least:g}.")


def one_of(cfg: DictConfig, key: str, choices: tuple[str, ...]) -> None:
    value = OmegaConf.select(cfg, key)
    if value not in choices:
        raise ConfigError(
            f"{key}={value}: use one of {', '.join(choices)}{nearest(value, choices)}"
        )


def more_than_nothing(cfg: DictConfig, key: str, most: float = math.inf) -> None:
    value = OmegaConf.select(cfg, key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key}={value}: should be a number.")
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{key}={value}: must be more than 0.")
    if value > most:
        raise ConfigError(f"{key}={value}: must be at most {most:g}.")


def check_hydra(config: DictConfig) -> None:
    """Refuses settings of Hydra's under which runs are not found or their paths not meant."""
    own = config.hydra
    if own.output_subdir != ".hydra":
        given = "null" if own.output_subdir is None else own.output_subdir
        raise ConfigError(
            f"hydra.output_subdir={given}: must be .hydra, where resume, eval and reports read a "
            f"run's config."
        )
    if own.job.chdir:
        raise ConfigError(
            "hydra.job.chdir=true: relative paths (model.path, dataset.path, resume) are relative "
            "to where you start, so a run stays there; leave it out."
        )


class CheckBeforeRun(Callback):
    """Hydra's door: a refused config leaves no folder behind."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        with refusing():
            check_sweep(config)

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with refusing():
            check_run(config)


@contextmanager
def refusing() -> Iterator[None]:
    """Ends the process at any error: one in a callback Hydra only warns of, and then runs."""
    from grpo.cli import refuse

    try:
        yield
    except ConfigError as error:
        refuse(error)
    except OmegaConfBaseException as error:  # an interpolation to what is not there
        key = getattr(error, "full_key", None)
        refuse(ConfigError(f"{f'{key}: ' if key else ''}{str(error).splitlines()[0]}"))
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(1) from error


def check_sweep(config: DictConfig) -> None:
    """Raises ConfigError where Hydra should not sweep as it is asked to."""
    from grpo.secrets import refuse_secrets

    refuse_secrets(config)
    check_hydra(config)
    if any(own.startswith("hydra.sweep.subdir=") for own in config.hydra.overrides.hydra):
        raise ConfigError(
            "hydra.sweep.subdir: a sweep's jobs lie in folders of their numbers, by which it goes "
            "on and is reported; leave it out."
        )
    if config.hydra.sweeper._target_.endswith(".BasicSweeper"):
        raise ConfigError(
            "hydra/sweeper=basic: has no report and can't go on after a kill; leave it out for "
            "grid, which takes the same overrides."
        )


def check_run(config: DictConfig) -> None:
    """Raises ConfigError where a config, or the folder that it names, is not fit for a run."""
    from grpo.check import check
    from grpo.secrets import refuse_secrets
    from grpo.trust import check_code

    refuse_secrets(config)
    check_hydra(config)
    own = without_hydra(config)
    check_code(own)
    check(own)
    folder = Path(config.hydra.run.dir)
    past.check_folder(folder, config.resume, config.model, config.adapter)
    writable(folder, "hydra.run.dir")


def writable(folder: Path, key: str) -> None:
    """Refuses a folder that can't be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):  # its own name: two processes may try at once
            pass
    except OSError as error:
        raise ConfigError(
            f"{key}={folder}: this folder can't be made or written ({error.strerror})."
        ) from error


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every key by its dotted name."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{name}.")
        else:
            found[name] = value
    return found
