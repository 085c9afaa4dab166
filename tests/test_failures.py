"""How a run ends whose policy broke, or which broke off within a step."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo.errors import RunError
from grpo.models.files import PACKAGE_FOLDER
from grpo.training import update as update_module
from tests.conftest import read_lines, read_summary

Grpo = Callable[..., tuple[int, str]]
SHORT = (
    "batch_size=2", "num_generation=4", "max_new_tokens=16", "eval.every=0", "eval.samples=1",
    "dataset.size=20", "dataset.eval_size=2", "tracking=none", "hydra.run.dir=run",
)  # fmt: skip


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("engine", ["native", "hf"])
def test_a_model_without_numbers_is_refused(
    engine: str, value: float, grpo: Grpo, tmp_path: Path
) -> None:
    shutil.copytree(PACKAGE_FOLDER / "tiny", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], value)
    save_file(weights, file, metadata={"format": "pt"})
    code, printed = grpo(*SHORT, "model=local", "model.path=model", f"rollout={engine}")
    assert code == 2
    assert "its logits are NaN or infinite" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("engine", ["native", "hf"])
def test_weights_that_explode_end_the_run_with_what_was_done_saved(
    engine: str, grpo: Grpo, tmp_path: Path
) -> None:
    many = (
        "batch_size=4",
        "num_generation=8",
        "max_steps=5",
        f"rollout={engine}",
        "max_new_tokens=48",
    )
    code, printed = grpo(*SHORT, *many, "learning_rate=1e30")
    assert code == 1
    (error,) = [line for line in printed.splitlines() if "logits are NaN or infinite" in line]
    assert "step 2: the policy's logits are NaN or infinite after 0 tokens of a completion" in error
    assert error.endswith("or with device.precision=fp32.")
    assert (tmp_path / "run/checkpoints/step_1/model/model.safetensors").is_file()
    content = read_summary(tmp_path / "run")
    assert (content["status"], content["steps"]) == ("failed", 1)


def test_half_a_step_is_never_saved(
    grpo: Grpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second update of step 3 fails; resumed, the run has the undisturbed one's numbers."""
    several = (*SHORT, "algorithm.minibatches=2", "max_steps=4", "checkpoint.every=2")
    code, printed = grpo(*several, "hydra.run.dir=whole")
    assert code == 0, printed
    calls, gradients = [], update_module.add_gradients

    def fail_at_sixth_call(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise RunError("out of memory with 80 tokens, and fewer can't be")
        return gradients(*arguments)

    monkeypatch.setattr(update_module, "add_gradients", fail_at_sixth_call)
    code, printed = grpo(*several)
    assert code == 1
    assert "step 3 ended after 1 of 2 updates, so it is not saved" in printed
    assert "step 3: out of memory" in printed
    assert [p.name for p in sorted((tmp_path / "run/checkpoints").glob("step_*"))] == ["step_2"]
    code, printed = grpo("resume=run")
    assert code == 0, printed
    wanted, found = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "run"))
    timeless = [
        [{k: v for k, v in line.items() if not k.startswith(("time/", "perf/", "memory/"))}
         for line in run]
        for run in (wanted, found)
    ]  # fmt: skip
    assert timeless[0] == timeless[1]
