"""The benchmark runs both sides, and refuses to compare what was not the same work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = Path(__file__).parents[1] / "scripts" / "benchmark"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command's module, as scripts/bench runs it."""
    import runpy

    monkeypatch.syspath_prepend(str(BENCHMARK))
    return runpy.run_path(str(BENCHMARK / "__main__.py"))


def rows(path: Path) -> Path:
    ask = "Tom has {} eggs and buys {} more. How many?"
    lines = [{"question": ask.format(n, n + 1), "answer": f"#### {2 * n + 1}"} for n in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.slow
def test_both_sides_do_the_same_work(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed: pip install grpo-bench[bench]")
    command = [sys.executable, str(BENCHMARK), "step", "tiny", "--out", str(tmp_path / "out.json")]
    command += ["--data", str(rows(tmp_path / "rows.jsonl"))]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    [result] = json.loads((tmp_path / "out.json").read_text())["results"]
    assert len(result["peer"]["seconds"]) == len(result["ours"]["seconds"]) == 3
    assert result["peer"]["length"] == result["ours"]["length"] == [16.0] * 3
    assert result["same_batch"]["grad_norm"] == pytest.approx(
        result["peer"]["grad_norm"][0], rel=2e-3
    )
    assert result["speedup"] > 0
    assert result["memory"] > 0


def test_other_work_is_refused(benchmark: Any, tmp_path: Path) -> None:
    """Shorter completions, another gradient, other prompts: each is named."""
    from settings import SETTINGS
    from work import prepare

    lines = [json.loads(line) for line in rows(tmp_path / "rows.jsonl").read_text().splitlines()]
    prepare(SETTINGS["tiny"], lines, tmp_path)
    side = {"seconds": [1.0] * 3, "length": [16.0] * 3, "first_prompts": []}
    peer = {**side, "loss": [0.0], "grad_norm": [2.0]}
    same = {"loss": 0.0, "grad_norm": 2.0}
    check = benchmark["check_same"]
    check("tiny", tmp_path, peer, side, same)
    for wrong, named in (
        ((peer, {**side, "length": [16.0, 16.0, 9.0]}, same), "ours: completions of"),
        (({**peer, "seconds": [1.0]}, side, same), "peer: 1 steps"),
        ((peer, side, {**same, "grad_norm": 2.1}), "gradients of norm"),
        ((peer, side, {**same, "loss": 0.1}), "loss 0.0 and 0.1"),
        (({**peer, "first_prompts": [[1, 2]]}, side, same), "prompts differ"),
    ):
        with pytest.raises(SystemExit, match=named):
            check("tiny", tmp_path, *wrong)


def test_a_wrong_setting_names_the_right_ones(
    benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark["main"](["step", "nope"])
    assert stopped.value.code == 2
    assert "note, long, worked" in capsys.readouterr().err
