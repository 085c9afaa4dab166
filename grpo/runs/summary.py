"""summary.json: a run's status and results, in one small file."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpo
from grpo.config.secrets import redact
from grpo.device import Device
from grpo.runs.files import write_json
from grpo.runs.jsonl import read_lines
from grpo.runs.progress import Progress

PACKAGES = ("torch", "transformers", "datasets", "hydra-core", "omegaconf", "wandb")


class Summary:
    """Writes summary.json when a run starts and when it ends; a killed run still says `running`."""

    def __init__(
        self,
        folder: Path,
        objective: str,
        device: Device,
        total_steps: int,
        trials: Mapping[str, int],
        hub_commits: Mapping[str, str],
    ) -> None:
        """
        Args:
            trials: metric -> the number of right or wrong answers that it is the share of.
            hub_commits: config key of a model or data set -> its commit on the hub.
        """
        self.folder, self.metric, self.device = folder, objective, device
        self.total_steps, self.trials = total_steps, dict(trials)
        self.hub_commits = dict(hub_commits)
        self.started = time.time()

    def write(self, status: str, progress: Progress, error: str = "") -> dict[str, Any]:
        """Writes summary.json and returns its content.

        status: running, finished, pruned, interrupted or failed.
        """
        evaluations = [
            {key: value for key, value in line.items() if key == "step" or key.startswith("eval/")}
            for line in read_lines(self.folder / "metrics.jsonl")
            if "eval/accuracy" in line
        ]
        last = evaluations[-1] if evaluations else {}
        content = {
            "status": status,
            "objective": {
                "name": self.metric,
                "value": last.get(self.metric) if status == "finished" else None,
            },
            "trials": self.trials,
            "first_evaluation": evaluations[0] if evaluations else None,
            "last_evaluation": last or None,
            "steps": progress.step,
            "total_steps": self.total_steps,
            "wall_seconds": round(progress.seconds, 3),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self.started)),
            "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
            "git_commit": find_git_commit(),
            "hub_commits": self.hub_commits,
            "device": self.device.describe(),
            "error": redact(error) or None,
        }
        write_json(self.folder / "summary.json", content)
        return content

    def get_objective(self, content: dict[str, Any]) -> float | None:
        value = content["objective"]["value"]
        return None if value is None else float(value)

    def format_closing(self, content: dict[str, Any]) -> str:
        """Formats the last lines in the terminal: the results, the folder, what to do next."""
        steps, seconds = content["steps"], content["wall_seconds"]
        lines = [f"{content['status']}: {steps} steps in {seconds / 60:.1f} minutes"]
        first, last = content["first_evaluation"], content["last_evaluation"]
        if first and first == last:
            lines.append(
                f"  sampled accuracy {first['eval/sampled_accuracy']:.1%} at step {first['step']}; "
                f"not evaluated since"
            )
        elif first and last:
            for label, key in (("sampled", "eval/sampled_accuracy"), ("greedy", "eval/accuracy")):
                lines.append(f"  {label} accuracy {first[key]:.1%} -> {last[key]:.1%}")
        folder = make_relative(self.folder)
        lines.append(f"  in {folder}: report.html, metrics.jsonl, completions.jsonl, summary.json")
        if content["status"] == "interrupted":
            lines.append(f"  resume:   grpo resume={folder}")
        else:
            lines.append(f"  model:    {folder}/checkpoints/latest/model")
            lines.append(f"  evaluate: grpo eval checkpoint={folder} eval.samples=16")
        return "\n".join(lines)


def make_relative(folder: Path) -> Path:
    """Returns the folder relative to the working directory, if it is inside it."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


@cache
def find_git_commit() -> str | None:
    """Returns the commit of the package's checkout, with + if it was changed; None without one."""
    checkout = Path(grpo.__file__).parents[1]
    command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--exclude=*"]
    if not (checkout / ".git").exists():
        return None
    try:
        result = subprocess.run([*command, "--dirty=+"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
