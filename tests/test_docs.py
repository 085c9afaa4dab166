"""The pages of docs/: what they say of keys, metrics, samples and numbers is what is there."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import hydra
import pytest
import torch
import torch.nn.functional as F
import yaml
from hydra.core.global_hydra import GlobalHydra
from torch import Tensor, tensor

from grpo.cli.explain import flatten_keys
from grpo.config import schema
from grpo.config.metric_names import (
    EVAL_METRICS,
    REWARD_METRICS,
    SOURCE_METRIC_PREFIXES,
    STEP_METRICS,
)
from grpo.objective import AVERAGINGS, DIVERGENCES, ESTIMATORS, Normalize, Tokens, clipped_surrogate
from grpo.objective.advantages import group_mean, group_std
from grpo.types import Example, Sample
from tests.test_config import CHOICES, CONF, compose

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
KEYS = (DOCS / "reference/keys.md").read_text()
METRICS = (DOCS / "reference/metrics.md").read_text()
FROM_SCRATCH = (DOCS / "from-scratch.md").read_text()
PUBLIC = ("data", "rewards", "objective", "types")
README_LINES = 200


def list_leaves(config: object, prefix: str) -> list[str]:
    """The keys below which there are no others, without those that bind code."""
    keys = flatten_keys(config, prefix)  # type: ignore[arg-type]
    return [
        key
        for key in keys
        if not any(other.startswith(f"{key}.") for other in keys) and not key.endswith("_target_")
    ]


def read_row(page: str, name: str) -> list[str]:
    """The cells beside a name in a table, of the first row that has it."""
    rows = re.findall(rf"^\| `{re.escape(name)}` \|(.*)\|$", page, re.MULTILINE)
    assert rows, f"{name} is not there"
    return [cell.strip() for cell in rows[0].split(" | ")]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_every_link_of_the_readme_leads_somewhere() -> None:
    """Of the pages the strict build says it."""
    for link in re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.M) if anchor else []
        slugs = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs, link


def test_every_extra_is_named() -> None:
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    page = (DOCS / "index.md").read_text()
    for extra in re.findall(r"^(\w+) = \[", extras.partition("\n[")[0], re.MULTILINE):
        assert read_row(page, extra)[-1]


def test_the_generated_parts_are_up_to_date() -> None:
    """If not: python scripts/reference."""
    found = subprocess.run(
        [sys.executable, ROOT / "scripts/reference", "--check"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr


def test_every_key_of_every_file_is_explained() -> None:
    """As the files have them, read without Hydra, by the command line's names."""
    for file in sorted(CONF.rglob("*.yaml")):
        content = yaml.safe_load(file.read_text()) or {}
        group = ".".join(file.relative_to(CONF).parent.parts)
        if "@package _global_" in file.read_text() or file.name == "eval.yaml":
            continue
        for key in schema.flatten_config(content, f"{group}." if group else ""):
            if ".defaults" in key or key.startswith("defaults") or key.endswith("_target_"):
                continue
            assert read_row(KEYS, key)[-1], f"{key} has no meaning"


def test_every_key_of_the_composed_default_is_explained() -> None:
    for key in list_leaves(compose(), ""):
        key = "model.wheel.*" if key == "model.wheel" else key
        if key not in ("adapter", "parallel"):  # none
            assert read_row(KEYS, key)[-1], f"{key} has no meaning"


@pytest.mark.parametrize("sweeper", ["grid", "optuna"])
def test_every_key_of_the_sweepers_is_explained(sweeper: str) -> None:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", [f"hydra/sweeper={sweeper}"], return_hydra_config=True)
    for key in list_leaves(cfg.hydra.sweeper, "hydra.sweeper."):
        assert read_row(KEYS, key)[-1], f"{key} has no meaning"


def test_every_choice_has_a_section() -> None:
    for choice in CHOICES:
        assert f"### `{choice}`" in KEYS


def test_no_meaning_is_left_of_a_key_that_is_gone() -> None:
    texts = yaml.safe_load((ROOT / "scripts/reference/meanings.yaml").read_text())
    for key in texts["meanings"]:
        assert f"`{key}`" in KEYS or key == "reward.*.weight", key


def test_every_metric_is_explained(short_run: Path) -> None:
    """Those that have names, and those of runs: of each kind there is one in tests/golden."""
    named = {*EVAL_METRICS, *STEP_METRICS, *(f"reward/{name}" for name in REWARD_METRICS)}
    files = [short_run / "metrics.jsonl", *(ROOT / "tests/golden").glob("*.jsonl")]
    logged = {
        key for file in files for line in file.read_text().splitlines() for key in json.loads(line)
    }
    loop = (ROOT / "grpo/training/loop.py").read_text()
    histograms = set(re.findall(r'"(histogram/\w+)"', loop))
    assert len(histograms) == 4
    assert "reward/from_sums" in logged
    for metric in (named | logged | histograms | {"loss/entropy"}) - {"step"}:
        for prefix in SOURCE_METRIC_PREFIXES:
            if metric.startswith(prefix):
                metric = f"{prefix}SET"
        unit_and_meaning = read_row(METRICS, "reward/NAME" if metric == "reward/answer" else metric)
        assert unit_and_meaning[-1], metric


def test_every_attribute_of_a_sample_is_explained() -> None:
    page = (DOCS / "guide/rewards.md").read_text()
    attributes = [name for name in vars(Sample) if not name.startswith("_")]
    for name in {*attributes, *(field.name for field in fields(Sample))}:
        assert read_row(page, f"sample.{name}")[-1]
    for field in fields(Example):
        assert read_row(page, f"sample.example.{field.name}")[-1]


def test_the_named_keys_of_other_tools_exist_here() -> None:
    page = (DOCS / "reference/other-tools.md").read_text()
    groups = {path.relative_to(CONF).as_posix() for path in CONF.rglob("*") if path.is_dir()}
    for row in re.findall(r"^\| `.*\|([^|]*)\|$", page, re.MULTILINE):
        for name in re.findall(r"`([\w./]+)(?:=[^`]*)?`", row):
            key = name.replace("NAME", "answer")
            known = f"`{key}`" in KEYS or key in groups or f"`{key}`" in METRICS
            value = (
                re.fullmatch(r"[a-z_]+", key)
                and f"`{key}`" in (DOCS / "guide/algorithms.md").read_text()
            )
            assert known or value or key in OTHER_WORDS, f"{name} in {row}"


OTHER_WORDS = {  # names and values that are theirs, or Hydra's
    "group", "batch", "none", "k1", "k2", "k3", "full", "kl", "mse", "low_var_kl", "hydra.run.dir",
    "group_norm", "reinforce_plus_plus", "reinforce",
}  # fmt: skip


CODE = re.findall(r'^```python title="([^"\n]*)"\n(.*?)^```', FROM_SCRATCH, re.DOTALL | re.M)


@pytest.mark.parametrize(("file", "passage"), CODE)
def test_code_that_is_quoted_is_code_that_runs(file: str, passage: str) -> None:
    assert passage in (ROOT / file).read_text()


def is_on_page(*numbers: float | Tensor, places: int = 3) -> bool:
    """Whether the page has these numbers, with a minus sign or a hyphen."""
    page = FROM_SCRATCH.replace("\N{MINUS SIGN}", "-")
    return all(f"{float(number):.{places}f}" in page for number in numbers)


def test_the_numbers_of_the_page_from_scratch() -> None:
    logits = tensor([2.0, 1.0, 0.0])
    policy = logits.softmax(dim=0)
    yes = F.one_hot(tensor(0), 3) - policy
    assert is_on_page(*policy, *policy.log(), *yes, *(policy[0] * yes))
    assert policy.new_tensor(0.1) ** 50 == 0
    assert is_on_page(50 * tensor(0.1).log(), places=1)
    assert tensor([0.0, 200.0]).softmax(dim=0).log()[0] == -torch.inf
    assert tensor([0.0, 200.0]).log_softmax(dim=0).tolist() == [-200, 0]

    advantage = Normalize(group_mean, group_std)
    for group in ([1.0, 0, 0, 1], [1.0, 1, 1, 0]):
        assert is_on_page(*advantage(tensor([group]))[0])
    assert advantage(tensor([[0.0, 0, 0, 0]])).tolist() == [[0, 0, 0, 0]]

    ratio = tensor([[0.30 / 0.245]])
    assert is_on_page(ratio, clipped_surrogate(ratio, ratio.log(), tensor([[0.866]])).loss)

    old, reference = tensor([0.9, 0.1]).log(), tensor([0.5, 0.5]).log()
    assert is_on_page(
        DIVERGENCES["reverse"](old, reference), DIVERGENCES["forward"](old, reference)
    )
    forward = F.kl_div(old, reference.exp(), reduction="sum")
    assert forward == pytest.approx(float(DIVERGENCES["forward"](old, reference)))
    for estimate in ESTIMATORS["reverse"].values():
        values = estimate(old, reference)
        assert is_on_page(*values, (old.exp() * values).sum())

    mask = torch.arange(30) < tensor([[10], [30]])
    tokens = Tokens(mask, torch.zeros(2, dtype=torch.long), 30)
    two_11 = advantage(tensor([[1.0, 0.0]])).T
    losses = {
        name: float((averaging(tokens) * -two_11).sum()) for name, averaging in AVERAGINGS.items()
    }
    assert losses["sequence_mean"] == pytest.approx(0)
    assert is_on_page(losses["token_mean"], losses["constant"])


def test_the_step_by_hand_is_the_step() -> None:
    logits = tensor([2.0, 1.0, 0.0], requires_grad=True)
    advantages_N = Normalize(group_mean, group_std)(tensor([[1.0, 0, 0, 1]]))[0]
    logprobs_N = logits.log_softmax(dim=0)[tensor([0, 1, 1, 0])]
    ratio = torch.exp(logprobs_N - logprobs_N.detach())[:, None]
    loss = clipped_surrogate(ratio, logprobs_N[:, None], advantages_N[:, None]).loss.mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(0)
    assert logits.grad is not None
    moved = logits.detach() - logits.grad
    assert is_on_page(*moved[:2], *moved.softmax(dim=0))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("material") is None, reason="no mkdocs-material: scripts/docs gets it"
)
def test_the_site_is_built_without_a_warning_and_has_every_public_name(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "reference/api.html").read_text()
    for name in PUBLIC:
        module = importlib.import_module(f"grpo.{name}")
        names = getattr(module, "__all__", None) or [
            attribute
            for attribute, value in vars(module).items()
            if inspect.getmodule(value) is module
        ]
        for attribute in names:
            assert f'id="grpo.{name}.{attribute}"' in page, attribute
    assert "arithmatex" not in (tmp_path / "from-scratch.html").read_text()  # all are drawn
    for html in tmp_path.rglob("*.html"):  # nothing is fetched from elsewhere
        fetched = re.findall(
            r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)', html.read_text()
        )
        assert not fetched, html


def list_messages() -> set[str]:
    """Returns the package's texts, with … for each value in them."""
    found: set[str] = set()
    for file in (ROOT / "grpo").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                found.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_every_message_on_the_page_of_errors_is_one_of_the_packages() -> None:
    page, messages = (DOCS / "reference/errors.md").read_text(), list_messages()
    cells = re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE)
    assert len(cells) > 15
    for cell in cells:
        parts = re.split(r"; did you mean|…|\b[A-Z]+\b|[`=:]", cell)
        for part in (part.strip() for part in parts):
            assert len(part) < 8 or any(part in text for text in messages), f"{part} in {cell}"
