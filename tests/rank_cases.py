"""Short runs by several ranks: the tests start this module as the ranks other than the first."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from omegaconf import DictConfig, OmegaConf, open_dict
from safetensors.torch import load_file
from torch import Tensor

from grpo.config.schema import find_conf_folder, register_schema, remove_hydra
from grpo.locate import find_for_training
from grpo.parallel import ONE_RANK, Ranks
from grpo.parallel.process_group import ProcessGroup
from grpo.parallel.start import join_started
from grpo.run import follow_training, train_from_config

SMALL = (
    "tracking=none",
    "device=cpu",
    "device.precision=fp32",
    "batch_size=5",
    "num_generation=4",
    "max_new_tokens=28",
    "max_steps=5",
    "eval.every=0",
    "eval.samples=1",
    "checkpoint.every=0",
    "dataset.eval_slice=:4",
    "doctor=none",
)
MEASURED = ("time/", "perf/", "memory/")  # what differs between two equal runs


def compose_small(overrides: Sequence[str], folder: Path) -> DictConfig:
    register_schema()
    setup_globals()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(find_conf_folder()), version_base="1.3"):
        cfg = compose("config", [*SMALL, *overrides], return_hydra_config=True)
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = str(folder)
    HydraConfig.instance().set_config(cfg)
    return remove_hydra(cfg)


def run_case(
    overrides: Sequence[str], folder: Path, ranks: Ranks = ONE_RANK
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Trains in a folder, and returns the metrics of each step and the weights at the end."""
    ranks.compute_on_first(lambda: (list(overrides), folder))
    (folder / ".hydra").mkdir(parents=True)
    cfg = compose_small(overrides, folder)
    OmegaConf.save(cfg, folder / ".hydra" / "config.yaml")
    train_from_config(cfg, folder, find_for_training(cfg), ranks)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (file,) = (folder / "checkpoints/latest/model").glob("*.safetensors")
    kept = [{k: v for k, v in line.items() if not k.startswith(MEASURED)} for line in lines]
    return kept, load_file(file)


def end_cases(ranks: Ranks) -> None:
    ranks.compute_on_first(lambda: None)


def follow_cases(ranks: ProcessGroup) -> None:
    """Takes part in the cases that the first rank runs, until it ends them."""
    case: Any
    while (case := ranks.compute_on_first(lambda: None)) is not None:
        overrides, folder = case
        cfg = compose_small(overrides, folder)
        follow_training(cfg, folder, find_for_training(cfg), ranks)


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    follow_cases(join_started())
