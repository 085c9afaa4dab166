"""Runs one evaluation from its config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from grpo.build.data import (
    build_evaluation,
    build_prompt_format,
    build_prompts,
    build_rewards,
)
from grpo.build.model import (
    bind_engine,
    build_budget,
    build_device,
    build_engine,
    fit_to_lengths,
    load_model,
)
from grpo.build.tracking import bind_sinks, build_evaluation_info
from grpo.locate import RunInputs
from grpo.parallel import ONE_RANK, Ranks
from grpo.parallel.agreement import check_same
from grpo.runs.files import FINISHED
from grpo.runs.jsonl import encode_line, replace_nonfinite
from grpo.tracking import Tracker
from grpo.tracking.console import format_evaluation_table
from grpo.tracking.tracker import make_answer_rows, make_evaluation_rows
from grpo.training.evaluation import evaluation_metrics, summarize_evaluation
from grpo.training.sampler import Sampler


def evaluate_from_config(
    cfg: DictConfig, folder: Path, found: RunInputs, ranks: Ranks = ONE_RANK
) -> float | None:
    """Evaluates a model on the evaluation rows; the first rank writes and prints the figures.

    Returns:
        The objective; None if it was not measured, and on the other ranks.
    """
    device = build_device(cfg, ranks=ranks)
    rewards = build_rewards(cfg, found)
    formats = [build_prompt_format(part.options, part.key) for part in found.sets]
    ranks.compute_on_first(found.model)  # so that only one rank downloads it
    model = load_model(cfg, found.model(), device, frozen=True)
    every = build_prompts(found, formats, model.tokenizer)
    check_same(
        ranks, lambda: {"checkpoint": model.fingerprint, "dataset": every.compute_fingerprint()}
    )
    prompts = every.evaluation
    model, longest = fit_to_lengths(cfg, model, prompts)
    model.model.requires_grad_(False)
    budget = build_budget(cfg, model, longest, with_reference=False, ranks=ranks)
    engine = build_engine(bind_engine(cfg), model, cfg.max_new_tokens, budget)
    evaluation = build_evaluation(cfg, Sampler(engine, rewards, ranks), prompts)
    info = build_evaluation_info(cfg, folder)
    tracker = Tracker([make(info=info) for make in (bind_sinks(cfg) if ranks.is_first else [])])
    try:
        greedy, sampled = evaluation.evaluate()
    except BaseException:
        tracker.close("failed", {"objective": {"name": cfg.objective, "value": None}})
        raise
    finally:
        for reward in rewards.values():
            reward.close()
    if not ranks.is_first:
        return None
    metrics = evaluation_metrics(greedy, sampled)
    scored = [answers for answers in (greedy, sampled) if answers]
    tracker.log_completions(
        [row for a in scored for row in make_evaluation_rows(a.rollout, a.scores)]
    )
    tracker.log(0, metrics)
    reports = summarize_evaluation(greedy, sampled)
    content: dict[str, Any] = {"checkpoint": str(cfg.checkpoint)}
    content |= {"hub_commits": found.find_hub_commits(), "prompts": len(prompts), **metrics}
    content["figures"] = reports
    (folder / "evaluation.json").write_text(json.dumps(replace_nonfinite(content), indent=2) + "\n")
    rows = [row for a in scored for row in make_answer_rows(a.rollout, a.scores)]
    (folder / "completions.jsonl").write_text("".join(map(encode_line, rows)), encoding="utf-8")
    objective = {"name": cfg.objective, "value": metrics.get(cfg.objective)}
    tracker.close(FINISHED, {"objective": objective})
    print(format_evaluation_table(reports))
    print(f"written to {folder}: evaluation.json, completions.jsonl", flush=True)
    return metrics.get(cfg.objective)
