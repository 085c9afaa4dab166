"""Prompts to completions, with the log-probabilities of the distribution they were sampled from."""

from grpo.rollout.engine import Engine
from grpo.rollout.hf import HFEngine
from grpo.rollout.native import NativeEngine

__all__ = ["Engine", "HFEngine", "NativeEngine"]
