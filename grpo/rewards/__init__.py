"""Rewards: callables that return a number for each sample. A config names and weights them."""

from grpo.rewards.answer import Answer, AnswerFormat, Task
from grpo.rewards.code import Code
from grpo.rewards.endpoint import Endpoint
from grpo.rewards.math import Math
from grpo.rewards.model import RewardModel
from grpo.rewards.scoring import Reward, RewardError, WeightedReward, compute_scores
from grpo.rewards.shape import (
    Cosine,
    Length,
    ReasoningSteps,
    Repetition,
    SoftOverlong,
    TagCount,
)

__all__ = [
    "Answer",
    "AnswerFormat",
    "Code",
    "Cosine",
    "Endpoint",
    "Length",
    "Math",
    "ReasoningSteps",
    "Repetition",
    "Reward",
    "RewardError",
    "RewardModel",
    "SoftOverlong",
    "TagCount",
    "Task",
    "WeightedReward",
    "compute_scores",
]
