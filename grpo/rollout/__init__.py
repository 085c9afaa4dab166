"""Prompts to completions, with the log-probabilities of the distribution they were sampled from."""

from grpo.rollout.native import NativeEngine

__all__ = ["NativeEngine"]
