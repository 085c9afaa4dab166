"""Speed and memory, side by side with TRL on the same machine, model, prompts and lengths.

    scripts/bench                       the settings for this machine: note long worked, or gpu
    scripts/bench step note             one step of a setting: peer and project in turn
    scripts/bench rollout long          decoding alone, next to transformers' generate
    scripts/bench update long           the optimizer step alone, next to the machine's matrix rate
    scripts/bench lengths note          rollout and update at half, once and twice the tokens
    scripts/bench roofline              what the machine can do
    scripts/bench memory                what a step is predicted to hold, and holds
    scripts/bench capacity              which models GPUs are predicted to hold
    scripts/bench startup               seconds until a command answers
    scripts/bench sweep                 what a job of a sweep takes beside its training
    scripts/bench page                  how long a large run's page takes to open in a browser

Each measurement has a process of its own, and a step to warm up first. Both sides are given the
same model, prompts and reward, and write every completion to its full length; that they did, and
that both have the same gradient on the same batch, is checked. Times are medians.

A step is taken by this project in the precision that it chooses for the machine, and by the peer in
fp32 and, where the processor computes in bf16 or there is a GPU, in bf16 too; the ratio is to the
faster of the two. --precision fp32 or bf16 holds both sides to one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import pages
from processes import run_quietly, run_script
from settings import ON_CPU, ON_GPU, QWEN, SETTINGS, SHAPES
from step import PRECISIONS, format_step, measure_step
from work import ROOT, load_gsm8k, prepare

# Those that need no prompts of GSM8K.
WITHOUT_WORK = ("memory", "capacity", "startup", "sweep", "page")
PARTS = ("step", "rollout", "update", "lengths", "roofline", *WITHOUT_WORK)


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    started = time.strftime("%Y-%m-%dT%H-%M-%S")
    report: dict[str, Any] = {"started": started, **describe_machine(), "results": []}
    out = options.out or ROOT / "outputs" / "bench"
    out = out if out.suffix == ".json" else out / f"{started}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [] if options.part in WITHOUT_WORK else load_gsm8k(options.data)
    for name in options.settings:
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            if options.part not in WITHOUT_WORK:
                prepare(SETTINGS[name], rows, work)
            result = measure(options.part, name, work, options.precision or "best")
            report["results"].append({"part": options.part, "setting": name, **result})
            out.write_text(json.dumps(report, indent=2) + "\n")
            print(format_result(options.part, name, result), flush=True)
    print(f"written to {out}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("part", nargs="?", default="step", choices=PARTS)
    parser.add_argument("settings", nargs="*", help=", ".join(SETTINGS))
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="of a step; best by default: see above"
    )
    parser.add_argument("--data", type=Path, help="GSM8K's train.jsonl; without it, from the hub")
    parser.add_argument("--out", type=Path, help="a .json, or its folder; outputs/bench by default")
    options = parser.parse_args(arguments)
    for name in options.settings:
        if name not in SETTINGS:
            parser.error(f"{name}: no such setting; there are {', '.join(SETTINGS)}")
    if not options.settings:
        usual = ON_GPU if has_gpu() else ON_CPU
        several = options.part == "step"
        options.settings = list(usual) if several else [usual[-1] if has_gpu() else "long"]
    if options.precision is not None and options.part != "step":
        parser.error(f"--precision {options.precision}: only for the part step, not {options.part}")
    if options.data is not None and not options.data.is_file():
        parser.error(f"--data {options.data}: no such file")
    return options


def has_gpu() -> bool:
    return Path("/proc/driver/nvidia").exists()


def describe_machine() -> dict[str, Any]:
    names = ("torch", "transformers", "grpo-bench")
    named = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    model = named[1] if named else platform.processor()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "commit": commit,
        "versions": {name: version(name) for name in names},
    }


def measure(part: str, name: str, work: Path, precision: str) -> dict[str, Any]:
    if part == "step":
        return measure_step(name, work, precision)
    if part == "memory":
        return {f"{x} {y}": run_script("memory.py", x, y) for x in SHAPES for y in ("fp32", "bf16")}
    if part == "capacity":
        return {f"{x} {y}": run_script("capacity.py", x, y) for y in ("full", "lora") for x in QWEN}
    if part == "startup":
        return measure_startup()
    if part == "sweep":
        return measure_sweep(work)
    if part == "page":
        return pages.measure_pages(work)
    return run_script("parts.py", part, work, name)


def measure_startup() -> dict[str, Any]:
    """Seconds until a command answers, next to the peer's."""
    binaries = Path(sys.executable).parent
    commands = {
        "grpo --help": ["grpo", "--help"],
        "grpo --cfg job": ["grpo", "--cfg", "job"],
        "grpo kl_wieght=1": ["grpo", "kl_wieght=1"],
        "trl grpo --help": ["trl", "grpo", "--help"],
    }
    seconds: dict[str, list[float]] = {}
    for name, (program, *rest) in commands.items():
        for _ in range(4):
            began = time.perf_counter()
            subprocess.run([binaries / program, *rest], capture_output=True)
            seconds.setdefault(name, []).append(time.perf_counter() - began)
    return {"seconds": {name: values[1:] for name, values in seconds.items()}}


def measure_sweep(work: Path) -> dict[str, Any]:
    """Seconds that each job of a sweep takes beside its training, with two models.

    Its training is the loop and the checkpoint at its end; the rest is composing, reading rows and
    weights, building, W&B's start and end, the page. The first job also imports the libraries.
    """
    job = ["batch_size=2", "num_generation=2", "max_new_tokens=8", "max_steps=2", "eval.samples=1"]
    job += ["dataset.eval_slice=:4", "checkpoint.every=0", "tracking.wandb.mode=offline"]
    seconds: dict[str, list[float]] = {}
    for model in ("tiny", "smollm2_135m"):
        folder = work / model
        seeds = ["-m", f"model={model}", "seed=0,1,2,3,4", f"sweep_dir={folder}"]
        began = time.time()
        run_quietly([sys.executable, "-m", "grpo", *seeds, *job])
        seconds[model] = []
        for number in range(5):
            run = folder / str(number)
            ended = (run / "report.html").stat().st_mtime
            trained = json.loads((run / "summary.json").read_text())["wall_seconds"]
            saved = (run / "checkpoints/latest").lstat().st_mtime
            saving = saved - (run / "metrics.jsonl").stat().st_mtime
            seconds[model].append(ended - began - trained - saving)
            began = ended
    return {"seconds": seconds, "two_jobs": measure_two_jobs(work)}


def measure_two_jobs(work: Path) -> dict[str, float]:
    """Seconds that two runs of the default experiment take, one after the other and at once."""
    seconds = {}
    for launcher in ("basic", "joblib"):
        command = [sys.executable, "-m", "grpo", "-m", "seed=0,1", f"hydra/launcher={launcher}"]
        command += ["tracking=none", f"sweep_dir={work / launcher}"]
        began = time.perf_counter()
        run_quietly(command)
        seconds[launcher] = time.perf_counter() - began
    return seconds


def format_result(part: str, name: str, result: dict[str, Any]) -> str:
    """A result in a few lines."""
    if part == "step":
        return "\n".join([f"{name}: {SETTINGS[name]}", *format_step(result)])
    if part == "memory":
        return "\n".join(
            f"  {name:<12} predicted {figures['predicted_gb']:5.2f} GB, measured "
            f"{figures['measured_gb']:5.2f}, {figures['predicted_gb'] / figures['measured_gb']:.2f}"
            for name, figures in result.items()
        )
    if part == "capacity":
        return "\n".join(
            f"  {name:<10} by hand {figures['by_hand_gb']:6.1f} GB, predicted "
            f"{figures['weights_gb']:6.1f}, "
            f"a completion with it {figures['needed_gb']['kept']:6.1f}, recomputed "
            f"{figures['needed_gb']['recomputed']:6.1f}; smallest GPU "
            f"{min(figures['fits']['kept'], default='none')} GB, recomputed "
            f"{min(figures['fits']['recomputed'], default='none')} GB"
            for name, figures in result.items()
        )
    if part == "startup":
        return "\n".join(f"  {k:<20} {median(v):6.2f} s" for k, v in result["seconds"].items())
    if part == "sweep":
        lines = [
            f"  {model:<14} first {first:5.2f} s, then {min(then):.2f} to {max(then):.2f} s a job"
            for model, (first, *then) in result["seconds"].items()
        ]
        basic, joblib = result["two_jobs"]["basic"], result["two_jobs"]["joblib"]
        lines.append(
            f"  two default runs: {basic:.0f} s one after the other, {joblib:.0f} s at once by "
            f"joblib, {basic / joblib:.2f} times as fast"
        )
        return "\n".join(lines)
    if part == "page":
        lines = [f"  {result['steps']} steps, {result['completions']} completions"]
        for tokens, figures in result["by_tokens"].items():
            seconds = figures["opening"]
            lines.append(
                f"  of {tokens} tokens: {figures['megabytes']:.1f} MB, written in "
                f"{figures['writing']:.1f} s, opened in {median(seconds):.2f} s "
                f"({min(seconds):.2f} to {max(seconds):.2f})"
            )
        return "\n".join(lines)
    return f"{part} {name}: " + json.dumps(result, indent=2)


if __name__ == "__main__":
    main(sys.argv[1:])
