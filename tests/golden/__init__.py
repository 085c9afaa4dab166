"""Six short runs whose every number is kept, so that a change of the code's form changes none.

    python -m tests.golden          # runs them anew and keeps what they give, in tests/golden/

The numbers are of one machine; test_golden.py says how they are compared on another.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MACHINE = HERE / "machine.json"
MEASURED = ("time/", "perf/", "memory/")  # of the machine, not of the mathematics

SHORT = (
    "experiment=smoke", "tracking=none", "dataset.eval_slice=:8", "eval.samples=2", "max_steps=3",
    "device.kind=cpu", "device.precision=fp32",
)  # fmt: skip
RUNS: dict[str, list[tuple[str, ...]]] = {  # each command resumes in the folder of the one before
    "default": [SHORT],
    "lora": [(*SHORT, "adapter=lora", "learning_rate=1e-3", "sampling.top_p=0.9")],
    "full": [(*SHORT, "kl=full", "kl_weight=0.05", "algorithm.minibatches=2")],
    "mix": [
        (*SHORT[:2], *SHORT[3:], "dataset=mix", "dataset.sets.sums.eval_slice=:4",
         "dataset.sets.differences.eval_slice=:4", "algorithm=dapo", "algorithm.resample=2"),
    ],
    "gspo_bf16": [(*SHORT, "algorithm=gspo", "device.precision=bf16")],
    "resumed": [(*SHORT, "max_steps=2"), ("resume=run", "max_steps=4")],
}  # fmt: skip


def describe_machine() -> dict[str, str]:
    """What the last bit of a sum depends on."""
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        fields = {
            key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
        }
        names = ("model name", "cpu family", "model", "stepping")
        processor = ", ".join(fields.get(key, "") for key in names)
        flags = sha256(fields.get("flags", "").encode()).hexdigest()[:16]
    except OSError:
        processor, flags = platform.processor(), ""
    return {
        "system": platform.system(),
        "processor": processor,
        "flags": flags,
        "torch": torch.__version__,
        "compiler": str(shutil.which(os.environ.get("CC", "cc")) is not None),
    }


def record(name: str, cwd: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that a run leaves in an empty folder, without what is measured."""
    for command in RUNS[name]:
        run_folder = () if command[0].startswith("resume=") else ("hydra.run.dir=run",)
        done = subprocess.run(
            [sys.executable, "-m", "grpo", *command, *run_folder], cwd=cwd, capture_output=True,
            text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    lines = map(json.loads, (cwd / "run/metrics.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in line.items() if not key.startswith(MEASURED)}
        for line in lines
    ]


def locate_golden_file(name: str) -> Path:
    return HERE / f"{name}.jsonl"
