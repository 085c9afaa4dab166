"""Data sets: a slice of rows becomes prompts with answers, in an endless, seekable order."""

from grpo.data.answers import answered
from grpo.data.arithmetic import Arithmetic
from grpo.data.gym import ReasoningGym
from grpo.data.source import Source
from grpo.data.table import GSM8K, Hub, Jsonl

__all__ = ["GSM8K", "Arithmetic", "Hub", "Jsonl", "ReasoningGym", "Source", "answered"]
