"""The benchmark runs both sides, and refuses to compare what was not the same work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest

BENCHMARK = Path(__file__).parents[1] / "scripts" / "benchmark"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command's module, as scripts/bench runs it."""
    import runpy

    monkeypatch.syspath_prepend(str(BENCHMARK))
    return runpy.run_path(str(BENCHMARK / "__main__.py"))


def write_rows(path: Path) -> Path:
    ask = "Tom has {} eggs and buys {} more. How many?"
    lines = [{"question": ask.format(n, n + 1), "answer": f"#### {2 * n + 1}"} for n in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.slow
def test_both_sides_do_the_same_work(benchmark: Any, tmp_path: Path) -> None:
    """In each precision that the peer is run in; the ratio is to the faster one."""
    from step import choose_peer_precisions

    pytest.importorskip("trl", reason="TRL is not installed: pip install grpo-bench[bench]")
    command = [sys.executable, str(BENCHMARK), "step", "tiny", "--out", str(tmp_path / "out.json")]
    command += ["--data", str(write_rows(tmp_path / "rows.jsonl"))]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    [result] = json.loads((tmp_path / "out.json").read_text())["results"]
    ours, peers = result["ours"], result["peers"]
    assert list(peers) == choose_peer_precisions("best", "cpu", Path("/proc/cpuinfo").read_text())
    assert len(ours["seconds"]) == 3
    assert ours["length"] == [16.0] * 3
    for precision, peer in peers.items():
        assert len(peer["seconds"]) == 3
        assert peer["length"] == ours["length"]
        assert peer["computed_in"] == peer["generated_in"] == [precision]
        assert peer["same_batch"]["grad_norm"] == pytest.approx(
            peer["grad_norm"][0], rel={"fp32": 2e-3, "bf16": 5e-2}[precision]
        )
    fastest = min(median(peer["seconds"][1:]) for peer in peers.values())
    assert median(peers[result["peer_precision"]]["seconds"][1:]) == fastest
    assert result["speedup"] == pytest.approx(fastest / median(ours["seconds"][1:]))
    assert result["memory"] > 0


@pytest.mark.slow
def test_one_precision_holds_both_sides(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed: pip install grpo-bench[bench]")
    command = [sys.executable, str(BENCHMARK), "step", "tiny", "--precision", "bf16"]
    command += ["--out", str(tmp_path / "out.json")]
    command += ["--data", str(write_rows(tmp_path / "rows.jsonl"))]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    [result] = json.loads((tmp_path / "out.json").read_text())["results"]
    assert list(result["peers"]) == [result["peer_precision"]] == ["bf16"]
    assert result["peers"]["bf16"]["computed_in"] == ["bf16"]
    assert result["ours"]["precision"] == "bf16"


@pytest.mark.parametrize(
    ("choice", "device", "flags", "expected"),
    [
        ("best", "cpu", "sse2 avx512f avx512_bf16", ["fp32", "bf16"]),
        ("best", "cpu", "sse2 amx_tile amx_bf16", ["fp32", "bf16"]),
        ("best", "cpu", "sse2 avx512f not_avx512_bf16", ["fp32"]),
        ("best", "cuda", "sse2", ["fp32", "bf16"]),
        ("fp32", "cpu", "avx512_bf16", ["fp32"]),
        ("bf16", "cpu", "sse2", ["bf16"]),
    ],
)
def test_the_peer_is_run_in_what_may_be_its_fastest(
    choice: str, device: str, flags: str, expected: list[str], benchmark: Any
) -> None:
    from step import choose_peer_precisions

    cpuinfo = (
        f"processor\t: 0\nmodel name\t: amx_bf16 by name alone\nflags\t\t: {flags}\nbugs\t\t:\n"
    )
    assert choose_peer_precisions(choice, device, cpuinfo) == expected


def test_the_result_names_each_precision_and_the_faster_one(benchmark: Any) -> None:
    from step import format_step

    def build_side(seconds: float) -> dict[str, Any]:
        return {"seconds": [9.0, seconds, seconds], "peak_gb": 2.0, "version": "1.16.0"}

    result = {
        "peers": {"fp32": build_side(4.0), "bf16": build_side(3.0)}, "peer_precision": "bf16",
        "ours": {**build_side(1.0), "precision": "fp32"},
        "speedup": 3.0, "speedup_least": 3.0, "speedup_most": 3.0, "memory": 1.0,
    }  # fmt: skip
    fp32, bf16, ours, ratio = format_step(result)
    assert fp32.split()[:4] == ["TRL", "1.16.0", "fp32", "4.0"]
    assert bf16.split()[:4] == ["TRL", "1.16.0", "bf16", "3.0"]
    assert ours.split()[:3] == ["grpo", "fp32", "1.0"]
    assert "3.00 times as fast as TRL in bf16" in ratio


def test_other_work_is_refused(benchmark: Any, tmp_path: Path) -> None:
    """Shorter completions, another gradient or precision, other prompts: each is named."""
    from settings import SETTINGS
    from step import check_same
    from work import prepare

    lines = [
        json.loads(line) for line in write_rows(tmp_path / "rows.jsonl").read_text().splitlines()
    ]
    prepare(SETTINGS["tiny"], lines, tmp_path)
    side = {"seconds": [1.0] * 3, "length": [16.0] * 3, "first_prompts": []}
    peer = {**side, "loss": [0.0], "grad_norm": [2.0], "computed_in": ["fp32"]}
    same = {"loss": 0.0, "grad_norm": 2.0}
    check_same("tiny", "fp32", tmp_path, peer, side, same)
    for wrong, named in (
        ((peer, {**side, "length": [16.0, 16.0, 9.0]}, same), "ours: completions of"),
        (({**peer, "seconds": [1.0]}, side, same), "peer: 1 steps"),
        ((peer, side, {**same, "grad_norm": 2.01}), "gradients of norm"),
        ((peer, side, {**same, "loss": 5e-4}), "loss 0.0 and 0.0005"),
        (({**peer, "first_prompts": [[1, 2]]}, side, same), "prompts differ"),
        (({**peer, "computed_in": ["bf16"]}, side, same), "products in bf16, not fp32"),
    ):
        with pytest.raises(SystemExit, match=named):
            check_same("tiny", "fp32", tmp_path, *wrong)
    in_bf16 = {**peer, "computed_in": ["bf16"]}
    check_same("tiny", "bf16", tmp_path, in_bf16, side, {"loss": 5e-4, "grad_norm": 2.01})
    with pytest.raises(SystemExit, match="gradients of norm"):
        check_same("tiny", "bf16", tmp_path, in_bf16, side, {"loss": 0.0, "grad_norm": 2.2})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["step", "tiny", "--precision", "fp16"], "choose from"),
        (["rollout", "tiny", "--precision", "bf16"], "--precision bf16: only for the part step"),
    ],
)
def test_a_precision_that_can_not_be_is_refused(
    arguments: list[str], named: str, benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark["main"](arguments)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_a_wrong_setting_names_the_right_ones(
    benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark["main"](["step", "nope"])
    assert stopped.value.code == 2
    assert "note, long, worked" in capsys.readouterr().err
