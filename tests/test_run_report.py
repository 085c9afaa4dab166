"""A run's page says what its files say, and lets no text become part of the page."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from grpo.config import flat
from grpo.models.find import PACKAGED
from grpo.report.run.charts import smoothed, thinned
from grpo.report.run.page import runs_page, write_run_page
from grpo.report.run.read import differences, read_run
from grpo.tracking.tokens import token_ends
from tests.conftest import copy_with_text

Grpo = Callable[..., tuple[int, str]]
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>&lt;`${1}`"


def content(page: str) -> dict[str, Any]:
    """What a page's script reads."""
    packed = re.search(r"<script type=text/plain id=content>([^<]*)</script>", page)
    assert packed is not None
    found: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(packed[1])))
    return found


def test_a_run_ends_with_its_page(short_run: Path) -> None:
    page = (short_run / "report.html").read_text()
    summary = json.loads((short_run / "summary.json").read_text())
    first, last = summary["first_evaluation"], summary["last_evaluation"]
    change = f"{first['eval/sampled_accuracy']:.1%} \u2192 {last['eval/sampled_accuracy']:.1%}"
    assert change in page
    assert not re.search(r"(src|href)=", page.replace("src=x", ""))  # nothing is fetched
    assert len(page) < 3e6


def test_its_data_is_that_of_the_files(short_run: Path) -> None:
    data = content((short_run / "report.html").read_text())
    rows = [json.loads(line) for line in (short_run / "completions.jsonl").read_text().splitlines()]
    assert len(data["completions"]["rows"]) == len(rows)
    for packed, row in zip(data["completions"]["rows"], rows, strict=True):
        assert data["completions"]["prompts"][packed[1]] == row["prompt"]
        assert packed[3] == row["completion"]
        assert sum(packed[10]) == len(row["completion"])  # the tokens spell it
        assert len(packed[11]) == row["tokens"]  # each with its KL
    metrics = [json.loads(line) for line in (short_run / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["reward/mean"] for line in metrics if "reward/mean" in line]
    drawn = [trace["y"] for figure in data["figures"] for trace in figure["data"]]
    assert rewards in drawn


def test_the_kl_of_its_tokens_is_k1(short_run: Path) -> None:
    """Their mean over a step, whose completions are all kept, is what the update measured."""
    rows = [json.loads(line) for line in (short_run / "completions.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (short_run / "metrics.jsonl").read_text().splitlines()]
    step = metrics[-1]["step"]
    own = [x for row in rows if row["step"] == step for x in row["token_kl"]]
    (k1,) = [line["kl/k1"] for line in metrics if line["step"] == step]
    assert sum(own) / len(own) == pytest.approx(k1, abs=1e-3)


def test_before_and_after_are_the_first_and_the_last_evaluation(short_run: Path) -> None:
    answers = content((short_run / "report.html").read_text())["answers"]
    summary = json.loads((short_run / "summary.json").read_text())
    assert (answers["first"], answers["last"]) == (0, summary["steps"])
    assert len(answers["rows"]) == 128
    for place, key in ((3, "first_evaluation"), (5, "last_evaluation")):
        right = [row[place] for row in answers["rows"]]
        assert sum(right) / len(right) == pytest.approx(summary[key]["eval/accuracy"])


def test_hostile_text_stays_text(short_run: Path, tmp_path: Path) -> None:
    copy_with_text(short_run, tmp_path / "run", HOSTILE)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    (tmp_path / "run/summary.json").write_text(json.dumps({**summary, "error": HOSTILE}))
    page = write_run_page(tmp_path / "run").read_text()
    assert HOSTILE not in page
    assert "<img" not in page
    assert content(page)["completions"]["rows"][0][3] == HOSTILE


def test_a_run_that_still_goes_is_read_as_far_as_it_is(short_run: Path, tmp_path: Path) -> None:
    shutil.copytree(short_run, tmp_path / "run", symlinks=True)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run/metrics.jsonl").write_text("".join(lines[:3]) + '{"step": 3, "rewa')
    (tmp_path / "run/summary.json").unlink()
    assert "at step 2" in write_run_page(tmp_path / "run").read_text()


def test_several_runs_lie_over_each_other(short_run: Path, tmp_path: Path, grpo: Grpo) -> None:
    other = ("experiment=smoke", "tracking=none", "kl_weight=0", "hydra.run.dir=other")
    assert grpo(*other)[0] == 0
    code, printed = grpo("report", "other", str(short_run))
    assert code == 0, printed
    page = (tmp_path / "other/runs.html").read_text()
    assert "<td>kl_weight</td><td>0.0</td><td>0.02</td>" in page
    reward = content(page)["figures"][0]
    names = [f"smoke ({folder})" for folder in ("other", short_run)]
    assert [trace["name"] for trace in reward["data"]] == names
    assert runs_page([read_run(short_run), read_run(tmp_path / "other")])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ((), "name the folder of one run or sweep"),
        (("nowhere",), "there is no such folder"),
        (("empty",), "holds no sweep"),
        (("silent",), "has logged nothing yet"),
        (("silent", "empty"), "don't go into one page"),
    ],
)
def test_what_is_no_run_is_refused(
    what: tuple[str, ...], message: str, grpo: Grpo, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "silent/.hydra").mkdir(parents=True)
    (tmp_path / "silent/.hydra/config.yaml").write_text("a: 1\n")
    code, printed = grpo("report", *what)
    assert code == 2, printed
    assert message in printed


def test_differences_are_of_every_key() -> None:
    one = {"a": {"b": 1, "c": 2}, "d": [1]}
    other = {"a": {"b": 1, "c": 3}, "e": None}
    assert flat(one) == {"a.b": 1, "a.c": 2, "d": [1]}
    assert differences([one, other]) == {"a.c": [2, 3], "d": [[1], None]}


def test_long_lines_are_thinned_to_means() -> None:
    steps, values = thinned(list(range(2500)), [float(n) for n in range(2500)])
    assert steps == list(range(0, 2500, 3))
    assert values[0] == 1.0  # of 0, 1, 2
    assert values[-1] == 2499.0
    assert smoothed([1.0, None, 1.0]) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("text", ["plain words", "naïve “quotes” — 你好 👩🏽‍🚀!", "", "\ufffd odd"])
def test_tokens_spell_the_text(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED / "tiny")
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    ends = token_ends(tokenizer, [*ids, tokenizer.eos_token_id], whole)
    assert len(ends) == len(ids) + 1
    assert ends == sorted(ends)
    assert ends[-1] == len(whole)
    assert token_ends(tokenizer, ids, whole + " and more") == []
