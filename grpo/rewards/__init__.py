"""Rewards: callables that take samples and give each a number. A config names and weighs them."""

from grpo.rewards.answer import Answer, AnswerFormat, Task
from grpo.rewards.score import Reward, RewardError, WeightedReward, score

__all__ = ["Answer", "AnswerFormat", "Reward", "RewardError", "Task", "WeightedReward", "score"]
