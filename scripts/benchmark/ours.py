"""This project's side: the command as a user types it, and what its run leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from settings import SYSTEM_PROMPT, Setting

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}  # as a run's summary says and its config


def list_overrides(setting: Setting, precision: str, work: Path) -> list[str]:
    return [
        "model=local", f"model.path={work}/model", f"device={setting.device}",
        f"device.precision={precision}", "dataset=jsonl",
        f"dataset.path={work}/rows.jsonl", "dataset.slice=:-1", "dataset.eval_slice=-1:",
        f"dataset.system_prompt='{SYSTEM_PROMPT}'", "dataset.max_prompt_tokens=2048",
        f"dataset.worked_examples={quote_examples(json.loads((work / 'worked.json').read_text()))}",
        "curriculum.order=given", f"batch_size={setting.prompts}",
        f"num_generation={setting.group}", f"max_new_tokens={setting.tokens}",
        f"temperature={setting.temperature}", f"kl_weight={setting.kl_weight}",
        f"learning_rate={setting.learning_rate}", f"max_steps={setting.steps + 1}",
        "~reward.answer", "+reward.vowels._target_=work.reward", "+reward.vowels.weight=1.0",
        "eval.every=0", "eval.samples=1", "checkpoint.every=0", "tracking=none",
        f"log_prompts={setting.prompts}",
    ]  # fmt: skip


def quote_examples(examples: list[dict[str, str]]) -> str:
    """As Hydra reads it on a command line."""

    def quote_text(value: str) -> str:
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"

    rows = [
        f"{{question: {quote_text(e['question'])}, answer: {quote_text(e['answer'])}}}"
        for e in examples
    ]
    return f"[{', '.join(rows)}]"


def run(setting: Setting, precision: str, work: Path) -> dict[str, Any]:
    """Its steps' figures, of a process of its own.

    precision: as `device.precision`, auto included.
    """
    folder = work / "ours"
    command = [sys.executable, "-m", "grpo", *list_overrides(setting, precision, work)]
    command.append(f"hydra.run.dir={folder}")
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\ngrpo failed")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "time/step" in line]
    completions = [json.loads(x) for x in (folder / "completions.jsonl").read_text().splitlines()]
    device = json.loads((folder / "summary.json").read_text())["device"]
    first = [row["prompt"] for row in completions if row["step"] == 1]
    return {
        "precision": PRECISIONS[device.split(", ")[-1]],
        "seconds": [step["time/step"] for step in steps],
        "generation": [step["time/rollout"] for step in steps],
        "update": [step["time/update"] for step in steps],
        "peak_gb": max(step["memory/peak_gb"] for step in steps),
        "grad_norm": [step["optim/grad_norm"] for step in steps],
        "length": [step["completion/length_mean"] for step in steps],
        "first_prompts": first,
    }
