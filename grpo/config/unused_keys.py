"""Finds keys that are given, but change nothing in this run, so that they can be reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from grpo.config.overrides import parse_key


@dataclass(frozen=True)
class Facts:
    """What a config alone doesn't say."""

    exact_sampler: bool  # the sampler's probabilities are the policy's, but for rounding
    updates: int  # of the optimizer, in the whole run
    own_code: bool = False  # the model comes with Python code


@dataclass(frozen=True)
class Rule:
    key: str
    is_unused: Callable[[DictConfig, Facts], bool]
    why: str  # and what would give it something to do


RULES = (
    Rule(
        "kl.sync_share",
        lambda cfg, facts: not cfg.kl.sync_every,
        "the reference doesn't move; set kl.sync_every",
    ),
    Rule(
        "kl.horizon",
        lambda cfg, facts: cfg.kl.target is None,
        "the weight doesn't adapt; set kl.target",
    ),
    *(
        Rule(
            f"algorithm.importance_{part}",
            lambda cfg, facts: facts.exact_sampler,
            "this sampler's probabilities are the policy's own; rollout=vllm and bf16 use it",
        )
        for part in ("cap", "floor", "outside", "level")
    ),
    Rule(
        "algorithm.max_sequence_kl",
        lambda cfg, facts: (
            facts.exact_sampler and cfg.algorithm.num_iterations * cfg.algorithm.minibatches == 1
        ),
        "this sampler's probabilities are the policy's own, until a second update; rollout=vllm, "
        "bf16, num_iterations and minibatches use it",
    ),
    Rule(
        "optim.warmup_steps",
        lambda cfg, facts: cfg.optim.warmup_steps > facts.updates,
        "the run ends before the learning rate has come to its height",
    ),
    Rule(
        "num_epochs",
        lambda cfg, facts: cfg.max_steps is not None,
        "max_steps says how long this run is",
    ),
    Rule(
        "model.trust_remote_code",
        lambda cfg, facts: cfg.model.trust_remote_code and not facts.own_code,
        "this model comes without code of its own",
    ),
    *(
        Rule(
            f"curriculum.{key}",
            lambda cfg, facts: not cfg.curriculum.samples,
            "how hard prompts are isn't known; set curriculum.samples",
        )
        for key in ("at_least", "at_most")
    ),
    Rule(
        "tracking.wandb.table_every",
        lambda cfg, facts: not cfg.log_prompts,
        "no completions are kept; set log_prompts",
    ),
)


def explain_unused_keys(cfg: DictConfig, overrides: Sequence[str], facts: Facts) -> Iterator[str]:
    """Returns a line for each override that changes nothing in this run.

    Args:
        overrides: those of the command line; keys of an experiment's file may be meant for others.
    """
    given = {parse_key(override) for override in overrides}
    for rule in RULES:
        if rule.key in given and rule.is_unused(cfg, facts):
            yield f"{rule.key}={OmegaConf.select(cfg, rule.key)} does nothing here: {rule.why}."
