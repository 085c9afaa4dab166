"""Several processes that train one model: each is a rank, which computes a share of every step."""

from grpo.parallel.ranks import ONE_RANK, Ranks, divide_by_cost

__all__ = ["ONE_RANK", "Ranks", "divide_by_cost"]
