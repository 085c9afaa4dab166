"""Kill it, resume it, get the same numbers."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from grpo.config.overrides import merge_overrides
from grpo.runs.lock import RunLocked, is_locked, locked
from grpo.runs.resume import read_past_precision
from grpo.training.checkpoint import hash_files
from tests.conftest import make_once, read_metrics, start_grpo, wait_for_step

Grpo = Callable[..., tuple[int, str]]
FEW = "dataset.eval_slice=:16"
FEW_OF_EACH = ("dataset.sets.sums.eval_size=8", "dataset.sets.differences.eval_size=8")
JOB = (
    "experiment=smoke", "max_steps=9", "eval.every=4", "checkpoint.every=2", "tracking=none", FEW,
)  # fmt: skip


def read_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints/latest/model/model.safetensors")


def check_same_run(a: Path, b: Path) -> None:
    assert read_metrics(a) == read_metrics(b)  # bit for bit: no tolerance
    assert (a / "completions.jsonl").read_bytes() == (b / "completions.jsonl").read_bytes()
    for name, weight in read_weights(a).items():
        assert torch.equal(weight, read_weights(b)[name])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption."""

    def make(cwd: Path) -> None:
        process = start_grpo(cwd, *JOB, "hydra.run.dir=run")
        assert process.wait(300) == 0

    return make_once(tmp_path_factory, "resume", make) / "run"


def test_killed_and_resumed_it_gives_the_same_numbers(whole: Path, tmp_path: Path) -> None:
    """It is killed with kill -9 twice, the second time in the resumed run."""
    run = tmp_path / "run"
    process = start_grpo(tmp_path, *JOB, "hydra.run.dir=run")
    wait_for_step(run, 3, process)
    process.kill()
    process.wait()
    before = [path.name for path in sorted((run / "checkpoints").glob("step_*"))]
    assert before
    assert json.loads((run / "summary.json").read_text())["status"] == "running"

    process = start_grpo(tmp_path, "resume=run")  # its overrides need not be repeated
    wait_for_step(run, 7, process)
    process.kill()
    process.wait()

    assert start_grpo(tmp_path, "resume=run").wait(300) == 0
    check_same_run(whole, run)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_interrupted_it_finishes_the_step_saves_and_goes_on(
    whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    process = start_grpo(tmp_path, *JOB, "hydra.run.dir=run")
    wait_for_step(run, 3, process)
    process.send_signal(number)
    assert process.wait(60) == 130
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    last = read_metrics(run)[-1]["step"]
    assert summary["steps"] == last < 9
    assert (run / "checkpoints/latest").resolve().name == f"step_{last}"  # nothing lost
    assert start_grpo(tmp_path, "resume=run").wait(300) == 0
    check_same_run(whole, run)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of the whole run that a test may damage."""
    shutil.copytree(whole, tmp_path / "a copy", symlinks=True)
    return tmp_path / "a copy"


def find_newest(run: Path) -> Path:
    return (run / "checkpoints/latest").resolve()


def truncate(checkpoint: Path) -> None:
    file = checkpoint / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def flip(checkpoint: Path) -> None:
    content = bytearray((checkpoint / "trainer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / "trainer.pt").write_bytes(content)


def unlist(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [truncate, flip, unlist])
def test_a_broken_checkpoint_is_said_and_the_one_before_taken(
    damage: Callable[[Path], None], whole: Path, copy: Path, grpo: Grpo
) -> None:
    assert find_newest(copy).name == "step_9"
    damage(find_newest(copy))
    code, printed = grpo(f"resume={copy}")
    assert code == 0, printed
    assert "step_9 is damaged" in printed
    assert f"resuming from {copy / 'checkpoints/step_8'}" in printed
    check_same_run(whole, copy)


def test_with_every_checkpoint_broken_nothing_is_lost(copy: Path, grpo: Grpo) -> None:
    before = (copy / "metrics.jsonl").read_bytes()
    for checkpoint in (copy / "checkpoints").glob("step_*"):
        truncate(checkpoint)
    code, printed = grpo(f"resume={copy}")
    assert code == 2
    assert "no intact checkpoint" in printed
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_another_model_is_refused_and_the_run_left_as_it_was(copy: Path, grpo: Grpo) -> None:
    before = (copy / ".hydra/overrides.yaml").read_text()
    code, printed = grpo(f"resume={copy}", "model=smollm2_135m")
    assert code == 2
    assert "this run trains model=tiny" in printed
    assert (copy / ".hydra/overrides.yaml").read_text() == before


def test_a_finished_run_goes_on_only_if_asked_for_more(copy: Path, grpo: Grpo) -> None:
    code, printed = grpo(f"resume={copy}")
    assert code == 2
    assert "has already done its 9 steps" in printed
    code, printed = grpo(f"resume={copy}", "max_steps=10")
    assert code == 0, printed
    assert [line["step"] for line in read_metrics(copy)] == list(range(11))


@pytest.mark.parametrize(("recorded", "precision"), [("float32", "fp32"), ("bfloat16", "bf16")])
def test_a_run_keeps_the_precision_that_auto_chose_where_it_began(
    recorded: str, precision: str, copy: Path, grpo: Grpo
) -> None:
    """Whichever of the two this processor would choose."""
    summary = json.loads((copy / "summary.json").read_text())
    summary["device"] = f"cpu, 1 thread, {recorded}"
    (copy / "summary.json").write_text(json.dumps(summary))
    assert read_past_precision(copy) == precision
    steps = summary["steps"] + 1
    code, printed = grpo(f"resume={copy}", f"max_steps={steps}", "device.precision=auto")
    assert code == 0, printed
    assert json.loads((copy / "summary.json").read_text())["device"].endswith(f", {recorded}")


def test_a_run_from_before_algorithms_had_a_kl_keeps_its_own(copy: Path, grpo: Grpo) -> None:
    """Its algorithm now has another KL."""
    file = copy / ".hydra/config.yaml"
    config = yaml.safe_load(file.read_text())
    for key in ("kl_weight", "kl_within"):
        del config["algorithm"][key]
    config["kl_weight"], config["kl"]["within"] = 0.02, "loss"
    file.write_text(yaml.safe_dump(config))
    overrides = copy / ".hydra/overrides.yaml"
    overrides.write_text(overrides.read_text() + "- algorithm=rloo\n")
    code, printed = grpo(f"resume={copy}", "max_steps=10")
    assert code == 0, printed
    after = yaml.safe_load(file.read_text())
    assert (after["kl_weight"], after["kl"]["within"]) == (0.02, "loss")
    assert after["kl"]["estimator"] == "k3"
    assert after["algorithm"]["baseline"] == "leave_one_out"


@pytest.mark.slow
def test_a_run_of_many_rows_is_the_run_of_few_and_goes_on_as_it_would_have(
    grpo: Grpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts made when drawn give the same run as prompts made before; also after a resume."""
    job = (
        "experiment=smoke", "tracking=none", "eval.every=0", "max_steps=4", "checkpoint.every=2",
        FEW, "algorithm=dapo",
    )  # fmt: skip
    assert grpo(*job, "hydra.run.dir=few")[0] == 0
    for module in ("data.source", "data.files", "build.data"):
        monkeypatch.setattr(f"grpo.{module}.MAX_EAGER_ROWS", 100)
    code, printed = grpo(*job, "hydra.run.dir=many")
    assert code == 0, printed
    assert "their prompts are made as they are drawn" in printed
    check_same_run(tmp_path / "few", tmp_path / "many")
    # Now some prompts are one token too long.
    short = (*job, "dataset.max_prompt_tokens=37", "hydra.run.dir=short")
    code, printed = grpo(*short)
    assert code == 0, printed
    assert "others are drawn in their place" in printed
    shutil.copytree(tmp_path / "short", tmp_path / "broken", symlinks=True)
    shutil.rmtree(tmp_path / "broken/checkpoints/step_4")
    (tmp_path / "broken/summary.json").unlink()
    code, printed = grpo("resume=broken")
    assert code == 0, printed
    check_same_run(tmp_path / "short", tmp_path / "broken")


def test_a_schedule_goes_on_from_the_rate_it_had_come_to(grpo: Grpo, tmp_path: Path) -> None:
    """After four of six linear steps, with ten in all, it goes from 2/6 to 0 in six more."""
    linear = (
        "experiment=smoke", "tracking=none", "eval.every=0", "optim.schedule=linear", FEW,
        "hydra.run.dir=run", "learning_rate=0.6e-4",
    )  # fmt: skip
    assert grpo(*linear, "max_steps=6")[0] == 0
    shutil.rmtree(tmp_path / "run/checkpoints/step_6")
    code, printed = grpo("resume=run", "max_steps=10")
    assert code == 0, printed
    rates = [line["optim/learning_rate"] for line in read_metrics(tmp_path / "run")[1:]]
    down = [6, 5, 4, 3, *(2 * (1 - n / 6) for n in range(6))]
    assert rates == pytest.approx([1e-5 * rate for rate in down])
    assert printed.count("to its new end") == 1


def test_a_refused_resume_leaves_the_run_as_it_was(copy: Path, grpo: Grpo) -> None:
    before = (copy / ".hydra/overrides.yaml").read_text()
    for wrong in ("dataset.size=many", "device=cuda", "max_steps=9"):
        assert grpo(f"resume={copy}", wrong)[0] == 2
        assert (copy / ".hydra/overrides.yaml").read_text() == before


def test_a_checkpoint_is_no_run_to_resume(copy: Path, grpo: Grpo) -> None:
    code, printed = grpo(f"resume={copy}/checkpoints/step_8")
    assert code == 2
    assert f"give the run, {copy}" in printed


def test_other_weights_under_the_same_name_are_refused(copy: Path, grpo: Grpo) -> None:
    """The reference would be another model, so every later KL would be wrong."""
    shutil.rmtree(copy / "checkpoints/step_8")
    state = torch.load(copy / "checkpoints/step_9/trainer.pt", weights_only=True)
    torch.save({**state, "base": "another"}, copy / "checkpoints/step_9/trainer.pt")
    folder = copy / "checkpoints/step_9"
    (folder / "manifest.json").write_text(json.dumps(hash_files(folder)))
    code, printed = grpo(f"resume={copy}", "max_steps=10")
    assert code == 2
    assert "has other weights now" in printed


def test_killed_after_its_last_checkpoint_a_run_is_finished_by_resume(
    copy: Path, grpo: Grpo
) -> None:
    before = (copy / "metrics.jsonl").read_bytes()
    (copy / "summary.json").write_text(json.dumps({"status": "running"}))
    code, printed = grpo(f"resume={copy}")
    assert code == 0, printed
    assert json.loads((copy / "summary.json").read_text())["status"] == "finished"
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_a_torn_last_line_is_forgotten(whole: Path, copy: Path, grpo: Grpo) -> None:
    shutil.rmtree(copy / "checkpoints/step_9")
    for name in ("metrics.jsonl", "completions.jsonl"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-20])
    (copy / "summary.json").write_text(json.dumps({"status": "running"}))
    code, printed = grpo(f"resume={copy}")
    assert code == 0, printed
    check_same_run(whole, copy)


def test_what_a_kill_left_of_a_checkpoint_is_no_checkpoint(
    whole: Path, copy: Path, grpo: Grpo
) -> None:
    """A kill while step 9 is written leaves only a partial folder, which is removed."""
    (copy / "checkpoints/step_9").rename(copy / "checkpoints/.step_9.partial")
    (copy / "checkpoints/.step_9.partial/manifest.json").unlink()
    (copy / "summary.json").write_text(json.dumps({"status": "running"}))
    code, printed = grpo(f"resume={copy}")
    assert code == 0, printed
    check_same_run(whole, copy)
    assert not list((copy / "checkpoints").glob(".*"))


def test_two_processes_are_kept_out_of_one_run(copy: Path, grpo: Grpo) -> None:
    with locked(copy):
        code, printed = grpo(f"resume={copy}", "max_steps=10")
    assert code == 2
    assert "another process is running in this folder" in printed


FAILS_ONCE = """
import pathlib
calls = 0

def reward(samples):
    global calls
    calls += 1
    # Before training an evaluation asks twice, then each step once: this is step 4's evaluation.
    if calls == 7 and not pathlib.Path("mended").exists():
        raise ValueError("down")
    return [float("5" in sample.completion) for sample in samples]
"""


@pytest.mark.slow
def test_an_evaluation_that_failed_is_made_up_for(tmp_path: Path) -> None:
    """The step's line is written once, with the evaluation, as if nothing had failed."""
    job = (*JOB, "max_steps=6", "+reward.own._target_=fails_once.reward", "+reward.own.weight=0.1")
    (tmp_path / "fails_once.py").write_text(FAILS_ONCE)
    assert start_grpo(tmp_path, *job, "hydra.run.dir=run").wait(300) == 1
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("failed", 4)
    assert read_metrics(tmp_path / "run")[-1]["step"] == 3
    assert "Failed at step 3." in (tmp_path / "run/report.html").read_text()
    (tmp_path / "mended").touch()
    assert start_grpo(tmp_path, "resume=run").wait(300) == 0
    assert start_grpo(tmp_path, *job, "hydra.run.dir=undisturbed").wait(300) == 0
    check_same_run(tmp_path / "undisturbed", tmp_path / "run")


def test_wandb_goes_on_with_the_same_run(grpo: Grpo, tmp_path: Path) -> None:
    job = (*JOB, "max_steps=2", "checkpoint.every=1", "tracking=wandb")
    assert grpo(*job, "hydra.run.dir=run")[0] == 0
    code, printed = grpo("resume=run", "max_steps=3")
    assert code == 0, printed
    ids = {path.name.rpartition("-")[2] for path in (tmp_path / "run/wandb").glob("offline-run-*")}
    assert len(ids) == 1
    assert len(list((tmp_path / "run/wandb").glob("offline-run-*"))) == 2


def test_resume_auto_finds_the_unfinished_run_of_these_overrides(
    whole: Path, grpo: Grpo, tmp_path: Path
) -> None:
    """It finds neither a finished run nor one of another experiment."""
    for name, overrides, status in (
        ("00-00-01-1", JOB, "running"),
        ("00-00-02-1", JOB, "finished"),
        ("00-00-03-1", (*JOB, "seed=5"), "running"),
    ):
        run = tmp_path / "outputs/2026-01-01" / name
        shutil.copytree(whole, run, symlinks=True)
        (run / ".hydra/overrides.yaml").write_text(json.dumps(list(overrides)))
        (run / "summary.json").write_text(json.dumps({"status": status}))
        shutil.rmtree(run / "checkpoints/step_9")
    code, printed = grpo(*JOB, "resume=auto")
    assert code == 0, printed
    assert "outputs/2026-01-01/00-00-01-1/checkpoints/step_8" in printed
    check_same_run(whole, tmp_path / "outputs/2026-01-01/00-00-01-1")


def test_resume_auto_with_nothing_to_resume_starts_anew(grpo: Grpo, tmp_path: Path) -> None:
    code, printed = grpo("experiment=smoke", "max_steps=1", "tracking=none", "resume=auto")
    assert code == 0, printed
    assert "so a new one starts" in printed


def test_only_the_newest_are_kept(whole: Path) -> None:
    kept = {path.name for path in (whole / "checkpoints").iterdir()}
    assert kept == {"step_8", "step_9", "latest"}


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param(
            ["kl.target=0.001", "kl.horizon=50", "kl.sync_every=2", "kl.sync_share=0.5", FEW],
            marks=pytest.mark.slow,
        ),
        ["algorithm=dapo", "algorithm.num_iterations=2", "algorithm.minibatches=2", "kl=full", FEW],
        pytest.param(
            [
                "dataset=mix",
                *FEW_OF_EACH,
                "device.gradient_checkpointing=true",
                "optim.name=adamw_8bit",
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["kl=k1", "kl.within=reward", "sampling.top_p=0.9", "reward=[answer,math,length]", FEW],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["moving", "several updates", "mix", "kl in the reward"],
)
def test_whatever_has_a_state_goes_on_where_it_stood(
    extra: list[str], grpo: Grpo, tmp_path: Path
) -> None:
    """Five steps at once, or in two parts with a checkpoint between, give the same numbers."""
    common = [
        "experiment=smoke", "tracking=none", "eval.every=0", "eval.samples=1",
        "checkpoint.every=3", "learning_rate=3e-4", *extra,
    ]  # fmt: skip
    assert grpo(*common, "max_steps=5", "hydra.run.dir=whole")[0] == 0
    assert grpo(*common, "max_steps=3", "hydra.run.dir=parts")[0] == 0
    code, printed = grpo("resume=parts", "max_steps=5")
    assert code == 0, printed
    whole, parts = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parts")
    for metrics in (whole, parts):
        metrics[3] = {k: v for k, v in metrics[3].items() if not k.startswith("eval/")}
    assert whole == parts
    assert len(whole) == 6
    if "kl.target=0.001" in extra:
        assert len({row["kl/weight"] for row in whole[1:]}) > 3


@pytest.mark.parametrize(
    ("past", "given", "merged"),
    [
        (["+a.b=1"], ["a.b=2"], ["+a.b=2"]),
        (["++a.b=1"], ["a.b=2"], ["++a.b=2"]),
        (["+a.b=1"], ["+a.b=2"], ["+a.b=2"]),
        (["+a.b=1", "c=3"], ["a.c=2"], ["+a.b=1", "c=3", "a.c=2"]),
        (["+a.b=1", "c=3"], ["~a.b"], ["c=3"]),
        (["c=1"], ["~c"], ["~c"]),
        (["~c"], ["c=1"], ["c=1"]),
    ],
)
def test_a_key_that_was_added_is_the_runs_own(
    past: list[str], given: list[str], merged: list[str]
) -> None:
    assert merge_overrides(past, given) == merged


def test_what_was_added_to_a_run_is_given_anew_without_a_plus(grpo: Grpo, tmp_path: Path) -> None:
    (tmp_path / "short_is_good.py").write_text(
        "def few(samples, most):\n    return [float(len(s.token_ids) <= most) for s in samples]\n"
    )
    added = ("_target_=short_is_good.few", "most=30", "weight=0.3")
    job = ("experiment=smoke", "tracking=none", "dataset.size=20", "dataset.eval_size=4")
    steps = ("max_steps=1", "eval.every=0", "hydra.run.dir=run")
    code, printed = grpo(*job, *steps, *(f"+reward.few.{option}" for option in added))
    assert code == 0, printed
    code, printed = grpo("resume=run", "max_steps=2", "reward.few.weight=0.6")
    assert code == 0, printed
    assert "weight: 0.6" in (tmp_path / "run/.hydra/config.yaml").read_text()
    code, printed = grpo("eval", "checkpoint=run", "reward.few.most=3", "hydra.run.dir=asked")
    assert code == 0, printed
    assert "most: 3" in (tmp_path / "asked/.hydra/config.yaml").read_text()
    code, printed = grpo("resume=run", "max_steps=3", "reward.few.wieght=0.6")
    assert code == 2
    assert "did you mean reward.few.weight" in printed


def test_who_looks_whether_a_run_goes_on_keeps_nobody_out(tmp_path: Path) -> None:
    """A dashboard checks all the time; a lock must never be refused because of it."""
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            is_locked(tmp_path)

    watchers = [threading.Thread(target=look) for _ in range(2)]
    for watcher in watchers:
        watcher.start()
    try:
        for _ in range(200):
            with locked(tmp_path):
                pass
    finally:
        ended.set()
        for watcher in watchers:
            watcher.join()
    with locked(tmp_path):
        assert is_locked(tmp_path)
        with pytest.raises(RunLocked), locked(tmp_path):
            pass
    assert not is_locked(tmp_path)
