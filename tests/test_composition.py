"""A config that is composed once is the one that Hydra composes twice."""

from __future__ import annotations

import io
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from grpo.cli.composition import composed_once, find_composed, find_yaml_loader, make_python_loader
from grpo.config import schema

CONF = schema.find_conf_folder()


def run_like_hydra(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch, once: bool
) -> tuple[Any, list[str], int]:
    """The config that Hydra would use, the overrides with the mode it adds, and compositions."""
    count = 0
    original = ConfigLoaderImpl._load_configuration_impl

    def load_and_count(*positional: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        return original(*positional, **named)

    schema.register_schema()
    GlobalHydra.instance().clear()
    flags = [override for override in overrides if override.startswith("-")]
    arguments = [override for override in overrides if override not in flags]
    with monkeypatch.context() as patched, composed_once(flags) if once else nullcontext():
        patched.setattr(ConfigLoaderImpl, "_load_configuration_impl", load_and_count)
        hydra = Hydra.create_main_hydra2("grpo", create_config_search_path(str(CONF)))
        mode = hydra.get_mode("config", arguments)
        if mode is None:
            mode = RunMode.MULTIRUN if flags else RunMode.RUN
            arguments.append(f"hydra.mode={mode.name}")
        config = hydra.compose_config(config_name="config", overrides=arguments, run_mode=mode)
    return config, arguments, count


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["experiment=smoke", "kl=full", "+reward.own._target_=a.b", "+reward.own.weight=1"],
        ["hydra.mode=RUN", "hydra.run.dir=x", "adapter=lora", "~doctor"],
        ["-m", "seed=0,1"],
        ["-m", "sweep=kl_grid", "hydra/launcher=joblib"],
        ["sweep=search"],  # whose file says that it is a sweep
        ["-m", "hydra/sweeper=optuna", "kl_weight=interval(0,1)"],
    ],
)
def test_the_config_is_the_same(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    twice, arguments_twice, count_twice = run_like_hydra(overrides, monkeypatch, once=False)
    once, arguments, count = run_like_hydra(overrides, monkeypatch, once=True)
    assert OmegaConf.to_container(once) == OmegaConf.to_container(twice)
    assert arguments == arguments_twice
    assert count_twice == 2
    assert count == (2 if overrides == ["sweep=search"] else 1)


@pytest.mark.parametrize("override", ["kl_wieght=1", "batch_size=x", "model=tinny", "seed=0,1"])
def test_an_error_is_the_same(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    for once in (False, True):
        with pytest.raises(HydraException) as raised:
            run_like_hydra([override], monkeypatch, once=once)
        said.append(str(raised.value))
    assert said[0] == said[1]


def test_the_config_that_a_key_is_not_in_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigCompositionException) as raised:
        run_like_hydra(["kl=k2", "kl.estimater=k1"], monkeypatch, once=True)
    composed = find_composed(raised.value)
    assert composed is not None
    assert composed.kl.estimator == "k2"
    assert find_composed(ValueError("another error")) is None


def test_what_is_replaced_is_put_back() -> None:
    before = (Hydra.get_mode, Hydra.compose_config, yaml.SafeLoader)
    with pytest.raises(ZeroDivisionError), composed_once([]):
        raise ZeroDivisionError
    assert (Hydra.get_mode, Hydra.compose_config, yaml.SafeLoader) == before


def test_yaml_reads_alike_in_c_and_in_python() -> None:
    texts = [file.read_text() for file in Path(CONF).rglob("*.yaml")]
    texts.append("a: 1e-3\nb: 1_000\nc: 2026-11-28\nd: on\ne: [1, .5, null, ~]\nf: |\n  x\n  y\n")
    for text in texts:
        assert yaml.load(text, find_yaml_loader()) == yaml.load(text, make_python_loader())
    for wrong in ("a: 1\na: 2\n", "a: [1\n", "a: b: c\n"):
        for loader in (find_yaml_loader(), make_python_loader()):
            with pytest.raises(yaml.MarkedYAMLError) as raised:
                yaml.load(io.StringIO(wrong), loader)
            assert raised.value.problem_mark is not None
