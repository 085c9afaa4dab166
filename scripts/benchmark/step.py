"""A training step of both sides, and whether both did the same work."""

from __future__ import annotations

import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import ours
from processes import run_script
from settings import SETTINGS

PRECISIONS = ("best", "fp32", "bf16")
BF16_FLAGS = {"avx512_bf16", "amx_bf16"}  # of processors that multiply in bf16
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-3}
GRADIENT_TOLERANCE = {"fp32": 2e-3, "bf16": 5e-2}  # of the norm


def choose_peer_precisions(choice: str, device: str, cpuinfo: str) -> list[str]:
    """The precisions that the peer is run in: the one asked for, or each that may be its fastest.

    Args:
        choice: one of PRECISIONS.
        cpuinfo: the content of /proc/cpuinfo.
    """
    if choice != "best":
        return [choice]
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    has_bf16 = device != "cpu" or (flags is not None and BF16_FLAGS & set(flags[1].split()))
    return ["fp32", "bf16"] if has_bf16 else ["fp32"]


def measure_step(name: str, work: Path, choice: str) -> dict[str, Any]:
    """Both sides' steps, and the ratios to the peer's fastest; refuses what was not the same work.

    Args:
        choice: of precision: fp32 or bf16 for both sides; best: this project's own default, and
            whichever the peer is faster in.
    """
    setting = SETTINGS[name]
    cpuinfo = Path("/proc/cpuinfo").read_text()
    peers = {
        precision: measure_peer(name, work, precision)
        for precision in choose_peer_precisions(choice, setting.device, cpuinfo)
    }
    project = ours.run(setting, "auto" if choice == "best" else choice, work)
    for precision, peer in peers.items():
        check_same(name, precision, work, peer, project, peer["same_batch"])
    fastest = min(peers, key=lambda precision: median(peers[precision]["seconds"][1:]))
    peer = peers[fastest]
    peer_seconds, project_seconds = peer["seconds"][1:], project["seconds"][1:]
    return {
        "work": asdict(setting),
        "precision": choice,
        "peers": {precision: drop_prompts(peer) for precision, peer in peers.items()},
        "peer_precision": fastest,
        "ours": drop_prompts(project),
        "speedup": median(peer_seconds) / median(project_seconds),
        "speedup_least": min(peer_seconds) / max(project_seconds),
        "speedup_most": max(peer_seconds) / min(project_seconds),
        "memory": project["peak_gb"] / peer["peak_gb"],
    }


def measure_peer(name: str, work: Path, precision: str) -> dict[str, Any]:
    """The peer's steps, with this project's loss and gradient on its first batch."""
    with tempfile.TemporaryDirectory() as folder:
        # It leaves the batch beside its figures.
        out = Path(folder) / "peer.json"
        peer = run_script("peer.py", work, name, precision, out=out)
        return {**peer, "same_batch": run_script("same.py", work, name, precision, out)}


def drop_prompts(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if name != "first_prompts"}


def check_same(
    name: str,
    precision: str,
    work: Path,
    peer: dict[str, Any],
    project: dict[str, Any],
    same: dict[str, Any],
) -> None:
    """Raises SystemExit where the two sides did not do the same work.

    Args:
        precision: of the peer and of `same`, this project's loss and gradient on its first batch.
    """
    from transformers import AutoTokenizer

    setting = SETTINGS[name]
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    prompts = {tuple(tokenizer.encode(text)) for text in project["first_prompts"]}
    differences = []
    if prompts != set(map(tuple, peer["first_prompts"])):
        differences.append("the first step's prompts differ")
    for side, figures in (("peer", peer), ("ours", project)):
        if any(length != setting.tokens for length in figures["length"]):
            differences.append(f"{side}: completions of {figures['length']} tokens")
        if len(figures["seconds"]) != setting.steps + 1:
            differences.append(f"{side}: {len(figures['seconds'])} steps")
    if peer["computed_in"] != [precision]:
        differences.append(f"peer: products in {', '.join(peer['computed_in'])}, not {precision}")
    if abs(same["loss"] - peer["loss"][0]) > LOSS_TOLERANCE[precision]:
        differences.append(f"loss {peer['loss'][0]} and {same['loss']}")
    norms = same["grad_norm"], peer["grad_norm"][0]
    if abs(norms[0] - norms[1]) > GRADIENT_TOLERANCE[precision] * norms[1]:
        differences.append(f"gradients of norm {norms[1]} and {norms[0]}")
    if differences:
        raise SystemExit(f"{name} {precision}: not the same work: {'; '.join(differences)}")


def format_step(result: dict[str, Any]) -> list[str]:
    """A result in a line for each side and precision, and one for the ratio."""
    peers = result["peers"]
    sides = [(f"TRL {peer['version']} {precision}", peer) for precision, peer in peers.items()]
    sides.append((f"grpo {result['ours']['precision']}", result["ours"]))
    lines = []
    for label, figures in sides:
        seconds = figures["seconds"][1:]
        lines.append(
            f"  {label:<16} {median(seconds):8.1f} s a step ({min(seconds):.1f} to "
            f"{max(seconds):.1f}), peak {figures['peak_gb']:.2f} GB"
        )
    faster = f" as TRL in {result['peer_precision']}" if len(peers) > 1 else ""
    lines.append(
        f"  {result['speedup']:.2f} times as fast{faster} ({result['speedup_least']:.2f} to "
        f"{result['speedup_most']:.2f}), {result['memory']:.2f} of the memory"
    )
    return lines
