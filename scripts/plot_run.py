#!/usr/bin/env python
"""Draws reward and held-out accuracy of runs: scripts/plot_run.py OUT.svg TITLE RUN [RUN ...]"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

from grpo.runs.jsonl import read_lines


def smooth(values: list[float], memory: float = 0.8) -> list[float]:
    """An exponential average, without the pull towards zero at its start."""
    average, weight, averages = 0.0, 0.0, []
    for value in values:
        average = memory * average + (1 - memory) * value
        weight = memory * weight + (1 - memory)
        averages.append(average / weight)
    return averages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("title")
    parser.add_argument("runs", type=Path, nargs="+")
    arguments = parser.parse_args()

    plt.rcParams.update({"font.size": 10, "svg.hashsalt": "grpo", "axes.grid": True})
    plt.rcParams.update({"grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for number, run in enumerate(arguments.runs):
        lines = read_lines(run / "metrics.jsonl")
        colour, label = f"C{number}", f"run {number}" if len(arguments.runs) > 1 else None
        steps = [line for line in lines if "reward/mean" in line]
        x, rewards = [line["step"] for line in steps], [line["reward/mean"] for line in steps]
        left.plot(x, rewards, color=colour, alpha=0.25, linewidth=1)
        left.plot(x, smooth(rewards), color=colour, linewidth=2, label=label)
        evaluated = [line for line in lines if "eval/accuracy" in line]
        x = [line["step"] for line in evaluated]
        for key, style in (("eval/accuracy", "--"), ("eval/sampled_accuracy", "-")):
            name = f"{'greedy' if key == 'eval/accuracy' else 'sampled'}" if number == 0 else None
            y = [line[key] for line in evaluated]
            right.plot(x, y, style, color=colour, marker="o", markersize=4, label=name)
    left.set(xlabel="step", ylabel="reward (training)", ylim=(0, 1.02))
    right.set(xlabel="step", ylabel="accuracy (held out)", ylim=(0, 1.02))
    right.legend(loc="lower right", frameon=False)
    if len(arguments.runs) > 1:
        left.legend(loc="lower right", frameon=False)
    figure.suptitle(arguments.title)
    figure.savefig(arguments.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
