"""The configs themselves: each choice composes, and each key is one that the code reads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from grpo import objective
from grpo.build.objective import warn_unused_kl
from grpo.build.resume import warn_changed_kl
from grpo.cli.explain import flatten_keys
from grpo.config import schema
from grpo.config.check import check_config
from grpo.config.check_algorithm import FUNCTION_NAMES
from grpo.config.objective_names import ESTIMATOR_NAMES
from grpo.config.overrides import merge_overrides
from grpo.config.suggest import suggest_names
from grpo.config.unused_keys import Facts, explain_unused_keys

Grpo = Callable[..., tuple[int, str]]
CONF = schema.find_conf_folder()
PACKAGE = Path(schema.__file__).parents[1]
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
CHOICES = [
    f"{file.parent.name}={file.stem}" for g in GROUPS for file in (CONF / g).glob("[!_]*.yaml")
]
BOUND = ("dataset", "reward", "rollout", "tracking", "sampling", "curriculum", "adapter")
NAMED = {
    "model=hub": ["model.id=a/b"],
    "model=local": ["model.path=x"],
    "reward=endpoint": ["reward.endpoint.url=http://localhost"],
    "reward=reward_model": ["reward.reward_model.model=a/b"],
}


def compose(*overrides: str, config: str = "config") -> DictConfig:
    schema.register_schema()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(config, list(overrides))


def test_the_groups_are_those_of_the_contract() -> None:
    assert set(GROUPS) == {
        "model", "dataset", "reward", "algorithm", "kl", "adapter", "rollout", "device",
        "parallel", "tracking", "doctor", "experiment", "sweep",
    }  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_and_passes_the_checks(
    choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpo.config.extras.find_spec", lambda package: package)  # extras are apart
    check_config(compose(choice, *NAMED.get(choice, [])))


def test_the_notes_experiment_is_the_notes() -> None:
    cfg = compose("experiment=note_gsm8k")
    assert cfg.model.id == "Qwen/Qwen2-0.5B-Instruct"
    assert (cfg.dataset.id, cfg.dataset.split, cfg.dataset.slice) == (
        "openai/gsm8k", "train", ":5%"
    )  # fmt: skip
    assert (cfg.num_epochs, cfg.batch_size, cfg.num_generation) == (3, 4, 4)
    assert (cfg.kl_weight, cfg.learning_rate, cfg.max_new_tokens) == (0.1, 1e-5, 50)


def test_the_command_line_wins_over_an_experiment() -> None:
    cfg = compose("experiment=note_gsm8k", "kl_weight=0.5", "model=tiny")
    assert (cfg.kl_weight, cfg.model.name, cfg.batch_size) == (0.5, "tiny", 4)


def test_the_model_recommends_the_learning_rate() -> None:
    assert compose("model=qwen2_5_1_5b").learning_rate == 5e-6
    assert compose("model=qwen2_5_1_5b", "learning_rate=1e-4").learning_rate == 1e-4


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], (0.02, "k3", "loss")),
        (["algorithm=dapo"], (0.0, "k3", "loss")),
        (["algorithm=luspo"], (0.0, "k3", "loss")),
        (["algorithm=rloo"], (0.03, "k1", "reward")),
        (["algorithm=reinforce_pp"], (0.001, "k1", "reward")),
        (["kl=k2", "algorithm=rloo"], (0.03, "k2", "reward")),
        (["algorithm=rloo", "kl=none"], (0.03, None, "loss")),
        (["algorithm=rloo", "kl.within=loss", "kl_weight=0.5"], (0.5, "k1", "loss")),
        (["algorithm=gpg", "kl_weight=0.1"], (0.1, "k3", "loss")),
        (["experiment=note_gsm8k"], (0.1, "k3", "loss")),
        (["experiment=note_gsm8k", "algorithm=rloo"], (0.1, "k1", "reward")),
        (["experiment=smollm2_chain_sum", "kl=full", "algorithm=rloo"], (0.01, "full", "reward")),
    ],
)
def test_the_algorithm_recommends_the_kl(
    overrides: list[str], expected: tuple[float, str | None, str]
) -> None:
    cfg = compose(*overrides)
    assert (cfg.kl_weight, cfg.kl.estimator, cfg.kl.within) == expected
    check_config(cfg)


def test_an_experiment_of_ones_own_may_choose_algorithm_and_kl(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults: [override /kl: k2, override /algorithm: rloo]\n"
    )
    found = compose(f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine")
    assert (found.kl_weight, found.kl.estimator, found.kl.within) == (0.03, "k2", "reward")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["algorithm=dapo", "kl=k2"], "kl is given"),
        (["algorithm=sapo", "kl.sync_every=5"], "kl.sync_every is given"),
        (["algorithm=dapo", "kl=k2", "kl_weight=0"], None),
        (["algorithm=dapo", "kl=none"], None),
        (["algorithm=dapo", "kl=k2", "kl_weight=0.1"], None),
        (["algorithm=dapo"], None),
        (["kl=k2"], None),
    ],
)
def test_a_kl_that_is_asked_for_and_has_no_weight_is_told(
    overrides: list[str], said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    warn_unused_kl(compose(*overrides), overrides, "k3")
    assert (said in caplog.text) if said else not caplog.records


def test_a_run_that_goes_on_with_another_kl_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """As a job of a sweep does that was started before algorithms had a KL of their own."""
    before = {"kl_weight": 0.02, "kl": {"estimator": "k3", "within": "loss"}, "algorithm": {}}
    warn_changed_kl(compose(), before)
    warn_changed_kl(compose("algorithm=dapo"), {**before, "algorithm": {"kl_weight": 0.02}})
    warn_changed_kl(compose("algorithm=dapo"), {**before, "kl": {"estimator": None}})
    assert not caplog.records
    warn_changed_kl(compose("algorithm=dapo"), before)
    assert "kl_weight=0.02 kl=k3 kl.within=loss continues as before" in caplog.text


def test_slices_need_no_quoting() -> None:
    cfg = compose("dataset=gsm8k", "dataset.slice=:5%", "dataset.eval_slice=-128:")
    assert (cfg.dataset.slice, cfg.dataset.eval_slice) == (":5%", "-128:")


def test_every_key_of_the_schema_is_read() -> None:
    """A key that does nothing is the worst kind. Those passed whole are parameters."""
    code = "\n".join(
        file.read_text()
        for folder in (".", "cli", "build")
        for file in PACKAGE.glob(f"{folder}/*.py")
    )
    for key in flatten_keys(compose(), ""):
        group, _, name = key.partition(".")
        if (group in (*BOUND, "device", "doctor") and name) or key.startswith(
            "algorithm.policy_loss."
        ):
            continue
        name = key.rpartition(".")[2]
        # Read by Hydra, by the page itself, and the one whose only choice is none.
        by_page = ("model.learning_rate", "algorithm.kl_weight", "algorithm.kl_within")
        if key in ("sweep_dir", *by_page, "parallel"):
            continue
        read = rf'(cfg|config)\.{key}\b|"{name}"|(model|algorithm|kl)\.{name}\b'
        assert re.search(read, code), key


def test_the_names_known_without_torch_are_those_of_the_tables() -> None:
    tables = {
        "baseline": objective.BASELINES,
        "scale": objective.SCALES,
        "aggregate": objective.AGGREGATES,
        "ratio": objective.RATIOS,
        "averaging": objective.AVERAGINGS,
    }
    assert {key: tuple(table) for key, table in tables.items()} == FUNCTION_NAMES
    for direction in objective.ESTIMATORS.values():
        assert (*direction, "full") == ESTIMATOR_NAMES


def test_unknown_keys_name_the_nearest() -> None:
    keys = ["kl_weight", "optim.warmup_steps", "dataset.slice"]
    assert suggest_names("kl_wight", keys) == "; did you mean kl_weight?"
    assert suggest_names("warmup_step", keys) == "; did you mean optim.warmup_steps?"
    assert suggest_names("zzz", keys) == ""
    assert suggest_names("kl_wight", [*keys, "doctor.kl_high"]) == "; did you mean kl_weight?"
    assert suggest_names("optim.warmup", [*keys, "optim.name", "optim"]) == (
        "; did you mean optim.warmup_steps?"
    )
    assert suggest_names("modle", ["tracking.mode", "model"]) == (
        "; did you mean model or tracking.mode?"
    )
    twins = ["kl.clip_high", "kl.clip_low", "kl.clop", "clip"]
    assert suggest_names("kl.clip_hgh", twins) == "; did you mean kl.clip_high?"
    assert suggest_names("kl.clip", twins) == "; did you mean clip?"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--help"],
            [
                "kl_weight: ${algorithm.kl_weight}",
                "  model: hub, local",
                "  hydra/launcher: basic, joblib, ray, slurm, submitit_local",
                "grpo eval checkpoint=DIR",
            ],
        ),
        (["--cfg", "job"], ["num_generation: 8", "_target_: grpo.data.Arithmetic"]),
        (["--info", "defaults-tree"], ["model: tiny", "kl: k3"]),
        (["eval", "--cfg", "job"], ["checkpoint: null"]),
    ],
)
def test_what_can_be_asked_without_running(
    arguments: list[str], says: list[str], tmp_path: Path
) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "grpo", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for text in says:
        assert text in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_shell_completes_choices_and_keys(tmp_path: Path) -> None:
    for typed, expected in (("grpo model=smol", "model=smollm2_135m"), ("grpo kl_w", "kl_weight=")):
        result = subprocess.run(
            [sys.executable, "-m", "grpo", "-sc", "query=bash"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "COMP_LINE": typed, "COMP_POINT": str(len(typed))},
        )
        assert expected in result.stdout, result.stderr


def test_a_config_file_that_is_not_yaml_is_named_with_its_line(grpo: Grpo, tmp_path: Path) -> None:
    (tmp_path / "own/experiment").mkdir(parents=True)
    (tmp_path / "own/experiment/bad.yaml").write_text("# @package _global_\nseed: [1,\nname: x\n")
    code, printed = grpo("--config-dir", str(tmp_path / "own"), "experiment=bad")
    assert code == 2
    assert "bad.yaml, line 4: not YAML" in printed
    assert "Traceback" not in printed


def test_past_overrides_are_kept_unless_given_anew() -> None:
    merged = merge_overrides(["model=tiny", "seed=1", "+reward.x.weight=1", "resume=a"], ["seed=2"])
    assert merged == ["model=tiny", "+reward.x.weight=1", "seed=2"]


@pytest.mark.parametrize(
    ("overrides", "key", "used"),
    [
        (["kl.sync_share=0.3"], "kl.sync_share", ["kl.sync_every=2"]),
        (["kl.horizon=9"], "kl.horizon", ["kl.target=0.1"]),
        (["algorithm.importance_cap=3"], "algorithm.importance_cap", None),
        (["optim.warmup_steps=30"], "optim.warmup_steps", ["optim.warmup_steps=3"]),
        (["num_epochs=3", "max_steps=5"], "num_epochs", ["max_steps=null"]),
        (["curriculum.at_most=0.5"], "curriculum.at_most", ["curriculum.samples=2"]),
        (["tracking.wandb.table_every=3", "log_prompts=0"], "table_every", ["log_prompts=1"]),
    ],
)
def test_a_key_that_does_nothing_here_is_told(
    overrides: list[str], key: str, used: list[str] | None
) -> None:
    found = list(
        explain_unused_keys(compose(*overrides), overrides, Facts(exact_sampler=True, updates=10))
    )
    assert len(found) == 1
    assert key in found[0]
    assert not list(
        explain_unused_keys(compose(*overrides), [], Facts(exact_sampler=True, updates=10))
    )
    then = [*overrides, *(used or [])]
    assert not list(
        explain_unused_keys(compose(*then), then, Facts(exact_sampler=used is not None, updates=10))
    )
