"""What a run and a sweep print first and last."""

from __future__ import annotations

import json
import re
from pathlib import Path

from grpo.device import Device
from grpo.report.sweep.write import explain_differences
from grpo.runs.summary import Summary


def test_the_first_line_names_folder_algorithm_and_kl(short_run: Path) -> None:
    first = (short_run / "train.log").read_text().splitlines()[0]
    assert " in run: 6 steps of 4 x 4 completions from 1600 prompts; " in first
    assert "; algorithm grpo, KL k3 of weight 0.02 in the loss; on cpu, " in first


def test_the_sampled_accuracy_is_told_before_the_greedy_one(
    short_run: Path, device: Device
) -> None:
    summary = Summary(short_run, "eval/sampled_accuracy", device, 6, {}, {})
    closing = summary.format_closing(json.loads((short_run / "summary.json").read_text()))
    assert closing.index("sampled accuracy") < closing.index("greedy accuracy")
    content = json.loads((short_run / "summary.json").read_text())
    stopped = summary.format_closing(
        {**content, "last_evaluation": content["first_evaluation"], "status": "interrupted"}
    )
    assert re.search(r"sampled accuracy [\d.]+% at step 0; not evaluated since\n", stopped)
    assert "->" not in stopped


def test_the_key_that_explains_the_differences_is_named() -> None:
    assert explain_differences({"learning_rate": 0.92, "kl_weight": 0.08}) == [
        "  learning_rate explains 92% of the differences between jobs, kl_weight 8% (fANOVA)"
    ]
    assert explain_differences({}) == []
