"""Revisions of the hub: each loads what it stands for, from a local cache that holds two."""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote

import datasets
import pytest
import torch
from datasets.arrow_writer import ArrowWriter
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForSequenceClassification

from grpo.data import GSM8K, Hub
from grpo.data.hub_rows import read_hub
from grpo.errors import ConfigError
from grpo.locate import locate_model
from grpo.models.files import PACKAGE_FOLDER, find_base_folder
from grpo.rewards import RewardModel
from grpo.runs.folder import locate_checkpoint_model
from tests.conftest import read_metrics
from tests.servers import RequestHandler, serving
from tests.test_config import compose
from tests.test_reward_model import build_samples, save_model

Grpo = Callable[..., tuple[int, str]]
FIRST, SECOND = "1" * 40, "2" * 40
REFS = {"main": FIRST, "v2": SECOND, "refs/pr/7": SECOND}
OFF_HUB = ("model=hub", "model.id=org/name")
SHORT = (
    "experiment=smoke", "tracking=none", "max_steps=2", "checkpoint.every=1", "eval.every=0",
    "dataset.eval_size=8", "hydra.run.dir=run", *OFF_HUB,
)  # fmt: skip


def add_to_cache(cache: Path, repository: str, commit: str, folder: Path) -> None:
    """A snapshot as the hub's client lays it out: links to blobs."""
    home = cache / repository
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir(exist_ok=True)
    for file in folder.iterdir():
        blob = home / "blobs" / f"{commit}-{file.name}"
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(blob)
    for ref, target in REFS.items():
        if target == commit:
            (home / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
            (home / "refs" / ref).write_text(commit)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub, which can't be reached; what is behind the second commit is no adder."""
    folder = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    other = tmp_path / "other"
    shutil.copytree(PACKAGE_FOLDER / "tiny", other)
    torch.manual_seed(0)
    weights = load_file(other / "model.safetensors")
    noisy = {name: weight + 0.05 * torch.randn_like(weight) for name, weight in weights.items()}
    save_file(noisy, other / "model.safetensors", metadata={"format": "pt"})
    add_to_cache(folder, "models--org--name", FIRST, PACKAGE_FOLDER / "tiny")
    add_to_cache(folder, "models--org--name", SECOND, other)
    return folder


@pytest.mark.parametrize(
    ("revision", "commit"),
    [(None, FIRST), ("main", FIRST), ("v2", SECOND), ("refs/pr/7", SECOND), (SECOND, SECOND)],
)
def test_each_revision_is_its_own_model(revision: str | None, commit: str, cache: Path) -> None:
    overrides = [] if revision is None else [f"model.revision={revision}"]
    folder = locate_model(compose(*OFF_HUB, *overrides).model)()
    assert folder == cache.resolve() / "models--org--name/snapshots" / commit
    assert locate_checkpoint_model("org/name", revision)() == folder
    same = filecmp.cmp(
        folder / "model.safetensors", PACKAGE_FOLDER / "tiny/model.safetensors", False
    )
    assert same is (commit == FIRST)


@pytest.mark.parametrize("revision", ["v3", "3" * 40])
@pytest.mark.parametrize("overrides", [OFF_HUB, ("model=smollm2_135m", "model.id=org/name")])
def test_another_revision_is_not_taken_for_one_that_is_not_there(
    revision: str, overrides: tuple[str, ...], cache: Path
) -> None:
    """Nor is the package that stands for SmolLM2 where the hub is out of reach."""
    cfg = compose(*overrides, f"model.revision={revision}")
    with pytest.raises(ConfigError, match=rf"org/name at revision {revision} is not in the local"):
        locate_model(cfg.model)
    with pytest.raises(ConfigError, match=rf"org/name at revision {revision} is not in the local"):
        locate_checkpoint_model("org/name", revision)


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_a_run_says_which_commit_it_trained_and_goes_on_from_it(grpo: Grpo, tmp_path: Path) -> None:
    code, printed = grpo(*SHORT, "model.revision=v2", "max_steps=3")
    assert code == 0, printed
    whole = read_metrics(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    assert grpo(*SHORT, "model.revision=v2")[0] == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["hub_commits"] == {"model": SECOND}
    code, printed = grpo("resume=run", "model.revision=main", "max_steps=3")
    assert code == 2
    assert "this run trains model=hub (model.revision=v2), not model=hub (main)" in printed
    code, printed = grpo("resume=run", "max_steps=3")
    assert code == 0, printed
    assert [line for line in read_metrics(tmp_path / "run") if line["step"] == 3] == [
        line for line in whole if line["step"] == 3
    ]


def test_an_adapter_keeps_the_commit_of_the_model_under_it(
    grpo: Grpo, cache: Path, tmp_path: Path
) -> None:
    """Also where the branch has moved on since."""
    code, printed = grpo(*SHORT, "model.revision=v2", "adapter=lora", "kl_weight=0")
    assert code == 0, printed
    folder = tmp_path / "run/checkpoints/latest/model"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/name", SECOND)
    (cache / "models--org--name/refs/v2").write_text(FIRST)
    assert find_base_folder(folder).name == SECOND
    shutil.rmtree(cache / "models--org--name/snapshots" / SECOND)
    with pytest.raises(ConfigError, match=f"base model, org/name at revision {SECOND}, is not in"):
        find_base_folder(folder)


@pytest.mark.usefixtures("cache")
def test_a_model_of_the_hub_is_evaluated_at_its_revision(grpo: Grpo, tmp_path: Path) -> None:
    evaluations = {}
    for name, overrides in (("first", []), ("second", ["model.revision=v2"])):
        code, printed = grpo(
            "eval", "checkpoint=org/name", "dataset.eval_size=8", "eval.samples=2",
            f"hydra.run.dir={name}", *overrides,
        )  # fmt: skip
        assert code == 0, printed
        evaluations[name] = json.loads((tmp_path / name / "evaluation.json").read_text())
    assert evaluations["first"]["hub_commits"] == {"model": FIRST}
    assert evaluations["second"]["hub_commits"] == {"model": SECOND}
    assert evaluations["first"]["eval/accuracy"] > evaluations["second"]["eval/accuracy"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("model.revision=v2",), "model.revision=v2: only a model on the hub has revisions"),
        (("model=local", "model.path=x", "model.revision=v2"), "model.revision=v2: only a model"),
        ((*OFF_HUB, "model.revision=../main"), "model.revision=../main: should be a branch"),
        ((*OFF_HUB, "model.revision="), "model.revision=: should be a branch"),
        (
            ("eval", "checkpoint=plain", "model.revision=v2"),
            "model.revision=v2: checkpoint=plain is a folder",
        ),
        (
            ("dataset=gsm8k", "dataset.path=x.jsonl", "dataset.revision=v2"),
            "dataset.revision=v2: dataset.path=x.jsonl is read instead",
        ),
        (("dataset=hub", "dataset.id=a/b", "dataset.revision=a..b"), "dataset.revision=a..b"),
        (("dataset=hub",), "dataset.id is not set"),
        (("dataset=hub", "dataset.id=plain"), "dataset.id=plain: should be ORG/NAME"),
        (
            ("reward=reward_model", "reward.reward_model.model=./plain",
             "reward.reward_model.revision=v2"),
            "reward.reward_model.revision=v2: model=./plain is a folder",
        ),
    ],
)  # fmt: skip
def test_a_revision_of_what_has_none_is_refused(
    arguments: tuple[str, ...], says: str, grpo: Grpo, tmp_path: Path
) -> None:
    shutil.copytree(PACKAGE_FOLDER / "tiny", tmp_path / "plain")
    job = [argument for argument in arguments if "=" not in argument]
    code, printed = grpo(
        *job, "experiment=smoke", "tracking=none", "hydra.run.dir=run",
        *(argument for argument in arguments if "=" in argument),
    )  # fmt: skip
    assert code == 2, printed
    assert says in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def test_a_reward_model_has_a_revision_too(cache: Path, tmp_path: Path) -> None:
    scores = {}
    for commit in (FIRST, SECOND):
        folder = save_model(tmp_path / commit)
        if commit == SECOND:
            model = Qwen2ForSequenceClassification.from_pretrained(folder)
            with torch.no_grad():
                model.score.weight.neg_()
            model.save_pretrained(folder)
        add_to_cache(cache, "models--org--judge", commit, folder)
        revision = None if commit == FIRST else "v2"
        scores[commit] = RewardModel("org/judge", device="cpu", revision=revision)(build_samples())
    assert scores[SECOND] == [-score for score in scores[FIRST]]
    with pytest.raises(ConfigError, match="model=org/judge at revision v3: is not in the local"):
        RewardModel("org/judge", revision="v3")


class HubOfOneModel(RequestHandler):
    """As much of the hub's protocol as a model's download needs."""

    folders: ClassVar[dict[str, Path]] = {}  # by commit
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0]).removeprefix("/api/models").strip("/")
        words = path.removeprefix("org/name/").split("/")
        self.asked.append("/".join(words))
        commit = REFS.get(words[1], words[1]) if len(words) > 1 else ""
        folder = self.folders.get(commit)
        if words == [""]:
            return self.answer(200, b"")
        if folder is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if words[0] == "revision":
            about = {"id": "org/name", "_id": "1", "sha": commit, "siblings": [], "tags": []}
            return self.answer(200, json.dumps({**about, "private": False}).encode())
        if words[0] == "tree":
            files = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name}
                for file in folder.iterdir()
            ]
            return self.answer(200, json.dumps(files).encode())
        content = (folder / words[2]).read_bytes()
        etag = hashlib.sha1(content).hexdigest()
        return self.answer(200, content, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """The address of a hub with org/name, whose second commit needs code of its own."""
    second = tmp_path / "second"
    shutil.copytree(PACKAGE_FOLDER / "tiny", second)
    config = json.loads((second / "config.json").read_text())
    custom_code = {
        "model_type": "own_kind",
        "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"},
    }
    (second / "config.json").write_text(json.dumps({**config, **custom_code}))
    (second / "modeling_own.py").write_text("Own = None")
    HubOfOneModel.folders = {FIRST: PACKAGE_FOLDER / "tiny", SECOND: second}
    HubOfOneModel.asked = []
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), HubOfOneModel)) as server:
        yield f"http://127.0.0.1:{server.server_port}"


@pytest.mark.parametrize(
    ("revision", "trusted", "says", "downloaded"),
    [
        (None, False, f"snapshots/{FIRST}", {"config.json", "model.safetensors"}),
        ("v2", True, f"snapshots/{SECOND}", {"model.safetensors", "modeling_own.py"}),
        ("v2", False, "org/name at revision v2: this model needs Python code", {"config.json"}),
        ("v3", False, "at revision v3 is not in the local cache and the hub has no such", set()),
    ],
)
def test_what_is_downloaded_is_the_revision(
    revision: str | None, trusted: bool, says: str, downloaded: set[str], hub: str, tmp_path: Path
) -> None:
    """And nothing but its config, where it can't be used."""
    program = (
        "from grpo.errors import ConfigError; from grpo.models.files import find_model_folder\n"
        f"where = 'model=hub', 'org/name', None, None, None, {revision!r}, {trusted}\n"
        "try: print(find_model_folder(*where))\n"
        "except ConfigError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home")}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert says in done.stdout, done.stdout + done.stderr
    files = {path.rpartition("/")[2] for path in HubOfOneModel.asked if path.startswith("resolve/")}
    assert downloaded <= files
    if "snapshots" not in says:
        assert files == downloaded


def add_rows(root: Path, subset: str, commit: str, answer: str) -> None:
    """A data set in the cache of the datasets library, as it leaves what it downloaded."""
    folder = root / "org___some_rows" / subset / "0.0.0" / commit
    folder.mkdir(parents=True)
    features = datasets.Features({"ask": datasets.Value("string"), "gold": datasets.Value("int64")})
    splits = datasets.SplitDict(dataset_name="some_rows")
    for split in ("train", "test"):
        file = folder / f"some_rows-{split}.arrow"
        with ArrowWriter(path=str(file), features=features) as writer:
            for n in range(3):
                writer.write({"ask": f"{subset} {split} {n}", "gold": int(answer)})
            writer.finalize()
        splits.add(datasets.SplitInfo(split, num_examples=3, dataset_name="some_rows"))
    datasets.DatasetInfo(
        features=features, splits=splits, config_name=subset, dataset_name="some_rows",
        version="0.0.0",
    ).write_to_directory(str(folder))  # fmt: skip


@pytest.fixture
def rows_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of org/SomeRows; the first commit was read last."""
    root = cache.parent / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(root))
    for commit, answer in ((SECOND, "2"), (FIRST, "1")):
        add_rows(root, "default", commit, answer)
    for ref, commit in REFS.items():
        file = cache / "datasets--org--SomeRows/refs" / ref
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(commit)
    return root


@pytest.mark.parametrize(
    ("revision", "answer"), [(None, 1), ("main", 1), ("v2", 2), (FIRST, 1), (SECOND, 2)]
)
@pytest.mark.usefixtures("rows_cache")
def test_each_revision_of_a_data_set_has_its_own_rows(revision: str | None, answer: int) -> None:
    source = Hub("org/SomeRows", None, revision, "ask", "gold")
    assert source.commit is None
    row = source.rows("test")[2]
    assert row == {"ask": "default test 2", "gold": answer}
    assert source.example(row, 2).answer == str(answer)
    assert source.commit == (FIRST, SECOND)[answer - 1]


@pytest.mark.usefixtures("rows_cache")
def test_a_run_on_a_data_set_of_the_hub_says_which_commit_it_was(
    grpo: Grpo, tmp_path: Path
) -> None:
    code, printed = grpo(
        *(word for word in SHORT if "eval_size" not in word), "max_steps=1", "dataset=hub",
        "dataset.id=org/SomeRows", "dataset.revision=v2", "dataset.question_column=ask",
        "dataset.answer_column=gold",
    )  # fmt: skip
    assert code == 0, printed
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["hub_commits"] == {"model": FIRST, "dataset": SECOND}


@pytest.mark.parametrize(
    ("subset", "split", "revision", "says"),
    [
        (None, "test", "v3", "org/SomeRows at revision v3 is not in the local cache and HF_HUB"),
        (None, "test", "3" * 40, "at revision 3+ is not in the local cache"),
        (None, "dev", "v2", r"dataset.split=dev: .*train.*test"),
        (None, "dev", None, r"dataset.split=dev: .*train.*test"),
        ("other", "test", "v2", r"dataset.subset=other: .*default"),
        ("other", "test", None, r"dataset.subset=other: .*default"),
    ],
)
@pytest.mark.usefixtures("rows_cache")
def test_what_a_data_set_does_not_have_is_told(
    subset: str | None, split: str, revision: str | None, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        read_hub("org/SomeRows", subset, split, revision)


def test_a_data_set_of_several_subsets_is_asked_which(rows_cache: Path) -> None:
    shutil.rmtree(rows_cache)
    for subset in ("main", "other"):
        add_rows(rows_cache, subset, SECOND, "2")
    with pytest.raises(ConfigError, match=r"dataset.subset is not set: .*main, other"):
        read_hub("org/SomeRows", None, "test", "v2")
    rows, _ = read_hub("org/SomeRows", "other", "test", "v2")
    assert rows[0]["ask"] == "other test 0"
    source = GSM8K(None, id="org/SomeRows", subset="main", revision="v2")
    assert source.rows("test")[0]["ask"] == "main test 0"
    assert source.commit == SECOND
