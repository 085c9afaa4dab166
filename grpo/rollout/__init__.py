"""Samples completions for prompts, with their log-probabilities under the sampled distribution."""

from grpo.rollout.engine import Engine
from grpo.rollout.hf import HFEngine
from grpo.rollout.native import NativeEngine

__all__ = ["Engine", "HFEngine", "NativeEngine"]
