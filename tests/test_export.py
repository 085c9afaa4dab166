"""A trained model leaves the bench: as a plain folder with a card, and in a conversation."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from http.server import HTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.commands.export import format_card, is_private, read_licence
from grpo.report.run.read import read_run
from tests.conftest import make_once, read_metrics, run_grpo
from tests.servers import RequestHandler, serving

Grpo = Callable[..., tuple[int, str]]
SHORT = ("experiment=smoke", "tracking=none", "dataset.eval_size=16", "hydra.run.dir=run")


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:

    def make(cwd: Path) -> None:
        done = run_grpo(*SHORT, "kl_weight=0.05", cwd=cwd)
        assert done.returncode == 0, done.stderr

    return make_once(tmp_path_factory, "export", make) / "run"


@pytest.fixture
def run(once: Path, tmp_path: Path) -> Path:
    """A run of this test's own, where it works."""
    shutil.copytree(once, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def test_an_exported_model_is_the_trained_one(run: Path, grpo: Grpo, tmp_path: Path) -> None:
    code, printed = grpo("export", "run", "mine")
    assert code == 0, printed
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "mine", dtype=torch.float32)
    trained = AutoModelForCausalLM.from_pretrained(
        run / "checkpoints/latest/model", dtype=torch.float32
    )
    for name, weight in trained.state_dict().items():
        assert torch.equal(weight, exported.state_dict()[name]), name
    assert AutoTokenizer.from_pretrained(tmp_path / "mine").chat_template


def test_its_card_says_what_it_is(run: Path, grpo: Grpo, tmp_path: Path) -> None:
    assert grpo("export", "run", "mine")[0] == 0
    card = (tmp_path / "mine/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "mit"  # as the packaged model says
    assert "grpo" in front["tags"]
    summary = json.loads((run / "summary.json").read_text())
    first, last = (summary[key]["eval/accuracy"] for key in ("first_evaluation", "last_evaluation"))
    assert f"| eval/accuracy | {first:.4g} | {last:.4g} |" in card
    assert "| `kl_weight` | 0.05 | 0.02 |" in card
    assert "grpo.data.Arithmetic" in card


def test_the_card_of_a_checkpoint_speaks_of_no_later_step(
    run: Path, grpo: Grpo, tmp_path: Path
) -> None:
    assert grpo("export", "run/checkpoints/step_2", "mine")[0] == 0
    card = (tmp_path / "mine/README.md").read_text()
    by_step = {line["step"]: line for line in read_metrics(run)}
    first, then = (by_step[step]["eval/sampled_accuracy"] for step in (0, 2))
    assert f"| eval/sampled_accuracy | {first:.4g} | {then:.4g} |" in card
    assert "in 2 steps." in card
    assert "eval/accuracy" in by_step[3]  # the run has a later one


def test_a_card_names_the_hubs_data_and_nobodys_folders(run: Path) -> None:
    """A local file is no data set of the hub's, whatever its path looks like."""
    trained = read_run(run)

    def format_card_with(*overrides: str, **dataset: object) -> str:
        config = {**trained.config, "dataset": {"_target_": "grpo.data.GSM8K", **dataset}}
        reward = {"_target_": "grpo.rewards.Endpoint", "url": "http://10.0.0.7/judge", "weight": 2}
        config["reward"] = {"judge": reward}
        return format_card(replace(trained, config=config, overrides=list(overrides)), "mine")

    hub = format_card_with("dataset=gsm8k", "seed=3", id="openai/gsm8k", subset="main", path=None)
    assert yaml.safe_load(hub.split("---")[1])["datasets"] == ["openai/gsm8k"]
    assert "grpo dataset=gsm8k seed=3" in hub
    local = format_card_with(
        "dataset.path=data/mine", "model.path=/home/me/secret_model", "tracking.wandb.entity=team",
        "reward.judge.url=http://10.0.0.7/judge", "dataset.system_prompt=/no_think",
        id="openai/gsm8k", path="data/mine", system_prompt="/no_think",
    )  # fmt: skip
    assert "datasets" not in yaml.safe_load(local.split("---")[1])
    for private in ("data/mine", "/home", "secret_model", "team", "10.0.0.7"):
        assert private not in local, private
    for public in ("dataset.path=…", "dataset.system_prompt=/no_think", "grpo.rewards.Endpoint"):
        assert public in local, public
    mix = {"sets": {"a": {"id": "one/a", "path": None}, "b": {"path": "b.jsonl"}}}
    assert yaml.safe_load(format_card_with(**mix).split("---")[1])["datasets"] == ["one/a"]


def test_a_card_has_nothing_of_the_error_that_ended_a_run(run: Path) -> None:
    trained = read_run(run)
    error = "can't reach http://judge.corp.example:8000/v1, cache /home/alice/x.db"
    failed = {**trained.summary, "status": "failed", "error": error}
    card = format_card(replace(trained, summary=failed), "mine")
    assert "Failed at step" in card
    for part in ("judge.corp", "8000", "alice"):
        assert part not in card


@pytest.mark.parametrize(
    ("key", "value", "private"),
    [
        ("reward.judge.server", "10.0.0.5:8000", True),
        ("reward.judge.server", "10.0.0.5", True),
        ("reward.judge.server", "gpu7:8000", True),
        ("reward.judge.server", "judge.corp.example:8000/v1", True),
        ("reward.judge.server", "[fd00::1]:8000", True),
        ("reward.judge.servers", ["judge", "b.example:80"], True),
        ("+reward.judge.servers", "[judge,b.example:80]", True),
        ("reward.judge.where", "/data", True),
        ("+reward.judge.where", "'/data'", True),
        ("reward.judge.where", "reads /srv/judge/x.db", True),
        ("reward.judge.where", "from ~/judge", True),
        ("reward.judge.word", "see http://there", True),
        ("dataset.system_prompt", "/no_think", False),
        ("dataset.system_prompt", "Think in <think>...</think>, then <answer>1/2</answer>.", False),
        ("dataset.system_prompt", "At 12:30 answer: yes and/or no.", False),
        ("dataset.slice", ":5%", False),
        ("dataset.slice", "10:20", False),
        ("dataset.slice", "-64:", False),
        ("dataset.id", "openai/gsm8k", False),
        ("dataset.revision", "refs/pr/1", False),
        ("reward.answer._target_", "grpo.rewards.Answer", False),
        ("sampling.stop", ["/end", "</answer>"], False),
        ("learning_rate", 1e-5, False),
    ],
)
def test_what_a_card_leaves_out(key: str, value: object, private: bool) -> None:
    assert is_private(key, value) is private


@pytest.mark.parametrize(
    ("private", "there_and_public"),
    [
        (True, True),
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
    ],
)
def test_a_push_is_private_where_that_is_asked(
    private: bool, there_and_public: bool, run: Path, tmp_path: Path
) -> None:
    """Against a hub of our own; to a page that everyone can see nothing private is uploaded."""
    with serving(Hub(there_and_public)) as hub:
        flags = ["--private"] if private else []
        done = run_grpo(
            "export", "run", "mine", "--push", "me/mine", *flags,
            cwd=tmp_path, env={"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_ours"},
        )  # fmt: skip
    assert hub.created == [private]
    if private and there_and_public:
        assert done.returncode == 1
        assert "--private: me/mine is there already and is public" in done.stderr
        assert hub.uploaded == set()
    else:
        assert done.returncode == 0, done.stderr
        assert {"README.md", "config.json", "model.safetensors"} <= hub.uploaded
    assert (tmp_path / "mine/model.safetensors").is_file()


class Hub(HTTPServer):
    """As much of the hub as a push asks."""

    def __init__(self, public: bool) -> None:
        super().__init__(("127.0.0.1", 0), HubPages)
        self.public = public
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.created: list[bool] = []  # of each repository that was asked for: whether privately
        self.uploaded: set[str] = set()


class HubPages(RequestHandler):
    server: Hub

    def do_GET(self) -> None:
        private = self.server.created == [True] and not self.server.public
        pages = {
            "/api/whoami-v2": {"name": "me", "type": "user"},
            "/api/models/me/mine": {"id": "me/mine", "private": private, "siblings": []},
        }
        page = pages.get(self.path.partition("?")[0])
        self.answer_json(page, 404 if page is None else 200)

    def do_POST(self) -> None:
        body = self.read_body()
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body).get("visibility") == "private")
            self.answer_json({"url": f"{self.server.address}/me/mine"})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"]} for file in json.loads(body)["files"]]
            self.answer_json(
                {"files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.server.uploaded |= {
                line["value"]["path"] for line in lines if line["key"] == "file"
            }
            address = f"{self.server.address}/me/mine/commit/{'0' * 40}"
            self.answer_json({"success": True, "commitUrl": address, "commitOid": "0" * 40})
        else:
            self.answer_json({"errors": [], "warnings": []})  # of the card's front matter


@pytest.mark.parametrize(
    ("text", "licence"),
    [("---\nlicense: apache-2.0\n---\n# A", "apache-2.0"), ("# A", None), (None, None)],
)
def test_the_licence_is_the_base_models(
    text: str | None, licence: str | None, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert read_licence(str(tmp_path)) == licence


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a run and the folder"),
        (("run",), "name a run and the folder"),
        (("nowhere", "mine"), "holds no run"),
        (("run", "run"), "is there already"),
        (("run", "mine", "--push"), "needs the model's id"),
        (("run", "mine", "--push", "not an id"), "needs the model's id"),
        (("run", "mine", "--push=no"), "--push no: needs the model's id"),
        (("run", "mine", "--private"), "--private: says how --push"),
        (("run", "mine", "--push", "some/body"), "--push some/body: "),
    ],
)
def test_what_cannot_be_exported_is_refused(
    arguments: tuple[str, ...], message: str, run: Path, grpo: Grpo, tmp_path: Path
) -> None:  # fmt: skip
    code, printed = grpo("export", *arguments)
    assert code == 2, printed
    assert message in printed
    assert not (tmp_path / "mine").exists()


def test_both_models_answer_side_by_side(
    run: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 12 + 7?\n/temperature 0.5\n/quit\n"))
    monkeypatch.setenv("COLUMNS", "120")
    code, printed = grpo("chat", "run", "max_new_tokens=40")
    assert code == 0, printed
    assert re.search(r"base: tiny.*trained: run", printed)  # in one line
    assert printed.count("<answer>") == 2
    assert "temperature 0.5" in printed


def test_a_plain_model_answers_alone(
    run: Path, grpo: Grpo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert grpo("export", "run", "mine")[0] == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 12 + 7?\n"))
    code, printed = grpo("chat", "mine", "max_new_tokens=40")
    assert code == 0, printed
    assert "base" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name one run or model"),
        (("nowhere",), "nowhere"),
        (("run", "temperature=hot"), "should be a number"),
        (("run", "max_new_tokens=0"), "max_new_tokens=0"),
        (("run", "top_k=3"), "top_k=3"),
    ],
)
def test_what_cannot_chat_is_refused(arguments: tuple[str, ...], message: str, grpo: Grpo) -> None:
    code, printed = grpo("chat", *arguments)
    assert code == 2, printed
    assert message in printed
