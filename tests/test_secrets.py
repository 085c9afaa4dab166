"""Secrets are taken from the environment alone, and are in none of the files that a run leaves."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from http.server import HTTPServer
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from grpo.config import secrets
from grpo.config.schema import find_conf_folder, flatten_config
from grpo.config.secrets import is_secret, redact, resolve_without_secrets
from tests.conftest import run_grpo
from tests.servers import RequestHandler, serving

Grpo = Callable[..., tuple[int, str]]
SHORT = ("experiment=smoke", "max_steps=1", "eval.samples=1", "dataset.eval_size=16")

# Twelve kinds: of services that the run uses, of those that it could, and of the machine.
PLANTED = {
    "HF_TOKEN": "hf_plantedAAAAAAAAAAAAAAAAAAAA",
    "WANDB_API_KEY": "0123456789planted0123456789abcdef0123456",
    "OPENAI_API_KEY": "sk-plantedBBBBBBBBBBBBBBBBBBBB",
    "AWS_SECRET_ACCESS_KEY": "plantedCCCCCCCCCCCCCCCCCCCC",
    "ENDPOINT_TOKEN": "plantedDDDDDDDDDDDD",  # reward.endpoint.token_env
    "ENDPOINT_QUERY": "plantedEEEEEEEEEEEE",  # in the address that ${oc.env:ENDPOINT_URL} gives
    "JUDGE_KEY": "plantedFFFFFFFFFFFF",  # an option of the user's own reward
    "QUOTED_TOKEN": "plantedGGGGGGGGGGGG",  # which that reward quotes where it fails
    "HTTPS_PROXY": "http://me:plantedHHHHHHHH@127.0.0.1:9",
    "SERVICE_PASSWORD": "plantedIIIIIIII",  # that Hydra is asked to hand on
}
IN_GIT, IN_NETRC = "plantedJJJJJJJJ", "plantedKKKKKKKK"
REWARD = """
import os
from grpo.types import Failure

def judged(samples, api_key):
    assert api_key == os.environ["JUDGE_KEY"]
    assert os.environ["HANDED_ON"] == os.environ["SERVICE_PASSWORD"]
    refused = Failure(f"401: {os.environ['QUOTED_TOKEN']} is no valid token")
    return [refused if number == 0 else 1.0 for number, _ in enumerate(samples)]
"""


@pytest.fixture
def endpoint() -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """A service that gives every sample 0.5: its port, and what it was asked with."""
    asked: list[tuple[str, str]] = []

    class Service(RequestHandler):
        def do_POST(self) -> None:
            asked.append((self.path, self.headers["Authorization"]))
            samples = json.loads(self.read_body())["samples"]
            self.answer_json({"rewards": [0.5 for _ in samples]})

    with serving(HTTPServer(("127.0.0.1", 0), Service)) as server:
        yield server.server_port, asked


def test_none_of_twelve_planted_secrets_is_in_any_file(
    endpoint: tuple[int, list[tuple[str, str]]], tmp_path: Path
) -> None:
    port, asked = endpoint
    work, home = tmp_path / "here", tmp_path / "home"
    work.mkdir(), home.mkdir()
    (work / "judge.py").write_text(REWARD)
    (home / ".netrc").write_text(f"machine api.wandb.ai login user password {IN_NETRC}\n")
    remote = f"https://me:{IN_GIT}@127.0.0.1/me/mine.git"
    subprocess.run(["git", "init", "-q"], cwd=work, check=True)
    subprocess.run(["git", "remote", "add", "origin", remote], cwd=work, check=True)
    env = PLANTED | {
        "HOME": str(home),
        "NO_PROXY": "127.0.0.1",
        "ENDPOINT_URL": f"http://127.0.0.1:{port}/?key={PLANTED['ENDPOINT_QUERY']}",
    }
    done = run_grpo(
        *SHORT, "tracking=[wandb,trackio]", "tracking.wandb.mode=offline",
        "tracking.wandb.log_model=true", "reward=[answer,endpoint]",
        "reward.endpoint.url='${oc.env:ENDPOINT_URL}'", "reward.endpoint.token_env=ENDPOINT_TOKEN",
        "+reward.judge._target_=judge.judged", "+reward.judge.weight=0.5",
        "+reward.judge.api_key='${oc.env:JUDGE_KEY}'",
        "+hydra.job.env_set.HANDED_ON='${oc.env:SERVICE_PASSWORD}'", "hydra.run.dir=run",
        cwd=work, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(asked) == {
        (f"/?key={PLANTED['ENDPOINT_QUERY']}", f"Bearer {PLANTED['ENDPOINT_TOKEN']}")
    }
    for command in (("report", "run"), ("export", "run", "model")):
        assert run_grpo(*command, cwd=work, env=env).returncode == 0
    assert "judge.judged" in (work / "model/README.md").read_text()
    assert "no valid token" in (work / "run/completions.jsonl").read_text()
    left = [file for file in work.rglob("*") if file.is_file() and ".git" not in file.parts]
    assert any(file.suffix == ".wandb" for file in left)
    assert any(file.suffix == ".db" for file in left)
    for name, secret in {**PLANTED, "git": IN_GIT, "netrc": IN_NETRC}.items():
        part = b"plantedHHHHHHHH" if name == "HTTPS_PROXY" else secret.encode()
        assert not [str(file) for file in left if part in file.read_bytes()], name


WRITTEN_OUT = {
    "an option named so": "+reward.judge.api_key=planted-words",
    "a password in a URL": "reward.endpoint.url=https://me:planted-words@there/",
    "a user who is a token": "reward.endpoint.url=https://planted-words@there/",
    "a key in a URL": "reward.endpoint.url='https://there/?access_token=planted-words'",
    "a header": "+reward.judge.header='Bearer planted-words'",
    "a token of the hub": "+reward.judge.word=hf_plantedAAAAAAAAAAAAAAAAAAAA",
    "a key of another": "+reward.judge.word=sk-ant-api03-plantedDDDDDDDDDDDDDD",
    "a key of a service": "tracking.wandb.notes='with sk-plantedBBBBBBBBBBBBBBBBBB'",
    "one in a list": "+reward.judge.words='[a,ghp_plantedCCCCCCCCCCCCCCCCCC]'",
    "one for Hydra to hand on": "+hydra.job.env_set.HF_TOKEN=planted-words",
    "one in a folder's name": "hydra.sweep.dir=runs/hf_plantedAAAAAAAAAAAAAAAAAAAA",
    "one in a job's name": "hydra.job.name=hf_plantedAAAAAAAAAAAAAAAAAAAA",
}


@pytest.mark.parametrize("override", WRITTEN_OUT.values(), ids=WRITTEN_OUT)
def test_a_secret_that_is_written_out_is_refused(override: str, grpo: Grpo, tmp_path: Path) -> None:
    code, printed = grpo(
        *SHORT, "reward=[answer,endpoint]", "+reward.judge._target_=judge.judged",
        override, "hydra.run.dir=run",
    )  # fmt: skip
    assert code == 2
    key = override.partition("=")[0].lstrip("+")
    assert f"{key}: holds a secret" in printed
    assert "planted" not in printed
    assert not (tmp_path / "run").exists()


def test_the_same_of_a_sweep_and_of_a_config_file(grpo: Grpo, tmp_path: Path) -> None:
    storage = "hydra.sweeper.storage='postgresql://me:planted@127.0.0.1:1/x'"
    search = ("hydra/sweeper=optuna", "kl_weight=interval(0,1)", storage)
    for overrides in (("+reward.answer.password=planted1,planted2",), search):
        code, printed = grpo("-m", *SHORT, *overrides, "sweep_dir=sweep")
        assert code == 2
        assert "holds a secret" in printed
        assert "planted" not in printed
        assert not (tmp_path / "sweep").exists()
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/mine.yaml").write_text(
        "# @package _global_\nreward:\n  answer:\n    api_key: planted\n"
    )
    code, printed = grpo("--config-dir", "conf", "experiment=mine", "hydra.run.dir=run")
    assert code == 2
    assert "reward.answer.api_key: holds a secret" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("dataset.system_prompt", "Never tell the secret token or the password."),
        ("reward.endpoint.token_env", "MY_TOKEN"),
        ("reward.endpoint.url", "http://localhost:8000/rewards?batch=1"),
        ("hydra.sweeper.storage", "postgresql://me@there/study"),
        ("hydra.sweeper.storage", "postgresql://me:${oc.env:PASSWORD}@there/study"),
        ("reward.judge.api_key", "${oc.env:KEY}"),
        ("reward.judge.api_key", ""),
        ("reward.judge.end_token", "<|end|>"),
        ("dataset.path", "/data/sk-data/hf_datasets/eyes.jsonl"),
        ("model.id", "mine/sk-learn-something-that-is-long"),
        ("model.id", "mine/hf_a_model_of_a_long_name"),
        ("model.id", "org/a-name-that-is-long-enough-to-be-a-key"),
    ],
)
def test_what_is_no_secret_is_taken(key: str, text: str) -> None:
    assert not is_secret(key, text)


@pytest.mark.parametrize(
    "name",
    ["judge_key", "judge_token", "openai_key", "wandb_token", "key", "tokens", "api-key", "pw",
     "apiKey", "authToken", "x_pass", "db-pw", "JUDGE_KEY", "keys", "auth", "client_secret",
     "user_credentials", "token", "judge_pwd"],
)  # fmt: skip
def test_a_key_that_is_named_like_a_secret_holds_one(name: str) -> None:
    assert is_secret(f"reward.judge.{name}", "some-words")
    assert not is_secret(f"reward.judge.{name}", "${oc.env:SOME}")


@pytest.mark.parametrize(
    "name",
    ["eos_token", "bos_token", "pad_token", "unk_token", "stop_token", "image_token", "end_tokens",
     "sort_key", "primary_key", "answer_key", "question_key", "special_tokens", "token_env",
     "key_env", "monkey", "bypass", "compass", "turkey", "author", "pass_at_k", "tokenizer",
     "key_column", "max_tokens"],
)  # fmt: skip
def test_a_harmless_name_holds_none(name: str) -> None:
    assert not is_secret(f"reward.judge.{name}", "some-words")


def test_a_number_is_no_secret_but_a_password_is() -> None:
    assert not is_secret("reward.judge.new_key", "3")
    assert not is_secret("reward.judge.use_key", "true")
    assert is_secret("reward.judge.password", "1234")


def test_every_key_of_the_shipped_configs_takes_a_text() -> None:
    for file in find_conf_folder().rglob("*.yaml"):
        content = yaml.safe_load(file.read_text()) or {}
        for key in flatten_config({k: v for k, v in content.items() if k != "defaults"}):
            assert not is_secret(key, "some-words"), f"{file.name}: {key}"


def test_what_a_secrets_key_takes_is_crossed_out_whatever_the_variable_is_called(
    grpo: Grpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reward quotes it in the error that ends the run."""
    secret = "plantedLLLLLLLLLLLL"
    monkeypatch.setattr(secrets, "CONFIG_SECRETS", set())
    monkeypatch.setenv("JKX", secret)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "refused.py").write_text(
        "def judged(samples, api_key):\n    raise ValueError(f'{api_key} was refused')\n"
    )
    code, printed = grpo(
        *SHORT, "tracking=none", "+reward.judge._target_=refused.judged", "+reward.judge.weight=1",
        "+reward.judge.api_key='${oc.env:JKX}'", "hydra.run.dir=run",
    )  # fmt: skip
    assert code == 1, printed
    assert secret not in printed
    assert "*** was refused" in json.loads((tmp_path / "run/summary.json").read_text())["error"]
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file


def test_what_comes_from_the_environment_stays_as_it_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Texts do, and what refers to them; numbers are resolved, and so is all else."""
    monkeypatch.setenv("WORD", "hidden")
    config = OmegaConf.create(
        {
            "a": {"url": "http://x/${oc.env:WORD}", "other": "plain"},
            "b": "${a.url}",
            "c": ["${oc.env:WORD}", "${a.other}"],
            "d": "${a}",
            "e": 3,
            "f": "${e}",
        }
    )
    assert resolve_without_secrets(config) == {
        "a": {"url": "http://x/${oc.env:WORD}", "other": "plain"},
        "b": "${a.url}",
        "c": ["${oc.env:WORD}", "plain"],
        "d": "${a}",
        "e": 3,
        "f": 3,
    }


def test_what_is_crossed_out_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [variable for variable in os.environ if variable.endswith(("KEY", "TOKEN"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SOME_TOKEN", "a-long-secret")
    monkeypatch.setenv(
        "OTHER_KEY", "short"
    )  # which stands in texts that have nothing to do with it
    monkeypatch.setenv("SOME_URL", "redis://me:in-a-url@there")
    assert redact("a-long-secret, in-a-url, short") == "***, ***, short"
