"""A run's page says what its files say, and lets no text become part of the page."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import random
import re
import shutil
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from grpo.config.check import check_metric
from grpo.config.schema import flatten_config
from grpo.errors import ConfigError
from grpo.models.end_tokens import Decoder
from grpo.models.files import PACKAGE_FOLDER
from grpo.report.run.browser import (
    ZERO_WIDTH,
    Block,
    encode_kl,
    encode_widths,
    group_by_step,
    pack_blocks,
)
from grpo.report.run.charts import downsample, smooth
from grpo.report.run.page import render_runs_page, write_run_page
from grpo.report.run.read import diff_configs, read_run, resolve_config
from grpo.tracking.tokens import find_token_ends
from tests.conftest import copy_with_text, read_metrics
from tests.test_config import compose

Grpo = Callable[..., tuple[int, str]]
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>&lt;`${1}`"


def read_content(page: str) -> dict[str, Any]:
    """Returns the data that a page's script reads."""
    (content,) = unpack(page, "id=content")
    return content


def read_rows_and_prompts(page: str) -> Iterator[tuple[list[Any], str]]:
    """Yields a page's completions with their prompts."""
    for block in unpack(page, "class=block"):
        for n, facts in enumerate(block["facts"]):
            rest = (block[column][n] for column in ("texts", "widths", "kl"))
            yield [*facts, *rest], block["prompts"][facts[1]]


def unpack(page: str, which: str) -> list[dict[str, Any]]:
    packed = re.findall(rf"<script type=text/plain {which}>([^<]*)</script>", page)
    return [json.loads(gzip.decompress(base64.b64decode(text))) for text in packed]


def test_a_run_ends_with_its_page(short_run: Path) -> None:
    page = (short_run / "report.html").read_text()
    summary = json.loads((short_run / "summary.json").read_text())
    first, last = summary["first_evaluation"], summary["last_evaluation"]
    change = f"{first['eval/sampled_accuracy']:.1%} \u2192 {last['eval/sampled_accuracy']:.1%}"
    assert change in page
    assert not re.search(r"(src|href)=", page.replace("src=x", ""))  # nothing is fetched
    assert len(page) < 3e6


def test_its_data_is_that_of_the_files(short_run: Path) -> None:
    page = (short_run / "report.html").read_text()
    data, shown = read_content(page), list(read_rows_and_prompts(page))
    rows = [json.loads(line) for line in (short_run / "completions.jsonl").read_text().splitlines()]
    for (packed, prompt), row in zip(shown, rows, strict=True):
        assert prompt == row["prompt"]
        *_, text, spans, kl = packed
        assert text == row["completion"]
        assert sum(ord(letter) - ZERO_WIDTH for letter in spans) == len(text)  # the whole text
        assert len(kl) == row["tokens"]  # each with its KL
    metrics = [json.loads(line) for line in (short_run / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["reward/mean"] for line in metrics if "reward/mean" in line]
    drawn = [trace["y"] for figure in data["figures"] for trace in figure["data"]]
    assert rewards in drawn


def test_the_kl_of_its_tokens_is_k1(short_run: Path) -> None:
    """If a step's completions are all kept, their mean is the k1 that the update measured."""
    rows = [json.loads(line) for line in (short_run / "completions.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (short_run / "metrics.jsonl").read_text().splitlines()]
    step = metrics[-1]["step"]
    token_kls = [x for row in rows if row["step"] == step for x in row["token_kl"]]
    (k1,) = [line["kl/k1"] for line in metrics if line["step"] == step]
    assert sum(token_kls) / len(token_kls) == pytest.approx(k1, abs=1e-3)


def test_before_and_after_are_the_first_and_the_last_evaluation(short_run: Path) -> None:
    answers = read_content((short_run / "report.html").read_text())["answers"]
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
    row, _ = next(read_rows_and_prompts(page))
    *_, text, _, _ = row
    assert text == HOSTILE


def test_a_run_that_still_goes_is_read_as_far_as_it_is(short_run: Path, tmp_path: Path) -> None:
    shutil.copytree(short_run, tmp_path / "run", symlinks=True)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run/metrics.jsonl").write_text("".join(lines[:3]) + '{"step": 3, "rewa')
    (tmp_path / "run/summary.json").unlink()
    assert "at step 2" in write_run_page(tmp_path / "run").read_text()


def test_several_runs_lie_over_each_other(short_run: Path, tmp_path: Path, grpo: Grpo) -> None:
    other = ("experiment=smoke", "tracking=none", "kl_weight=0", "hydra.run.dir=other")
    assert grpo(*other, "name=run")[0] == 0  # the other's name is its folder's: run
    code, printed = grpo("report", "other", str(short_run))
    assert code == 0, printed
    page = (tmp_path / "other/runs.html").read_text()
    assert "<td>kl_weight</td><td>0.0</td><td>0.02</td>" in page
    reward = read_content(page)["figures"][0]
    names = [f"run ({folder})" for folder in ("other", short_run)]
    assert [trace["name"] for trace in reward["data"]] == names
    by_title = {
        figure["layout"]["yaxis"].get("title", {}).get("text"): figure["data"]
        for figure in read_content(page)["figures"]
    }
    seconds = by_title["time/step"]  # not stacked
    assert [trace["name"] for trace in seconds] == names
    assert not any("stackgroup" in trace for trace in seconds)
    accuracy = read_content(page)["figures"][1]["data"]
    kinds = ("sampled_accuracy", "accuracy")
    assert [trace["name"] for trace in accuracy] == [
        f"{n}: {kind}" for n in names for kind in kinds
    ]
    assert render_runs_page([read_run(short_run), read_run(tmp_path / "other")])


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
    assert flatten_config(one) == {"a.b": 1, "a.c": 2, "d": [1]}
    assert diff_configs([one, other]) == {"a.c": [2, 3], "d": [[1], None]}


def test_a_config_is_read_with_what_its_keys_refer_to() -> None:
    """References to keys that are not compared are resolved; unresolvable ones stay as written."""
    config = {
        "name": "a", "sweep_dir": "d", "hydra": {}, "rate": "${model.rate}", "model": {"rate": 0.1},
        "tracking": {"group": "${name}", "folder": "${sweep_dir}/x", "day": "${gone:%d}"},
        "stop": ["${name}"],
    }  # fmt: skip
    assert resolve_config(config) == {
        "name": "a", "rate": 0.1, "model": {"rate": 0.1},
        "tracking": {"group": "a", "folder": "d/x", "day": "${gone:%d}"}, "stop": ["a"],
    }  # fmt: skip


def test_long_lines_are_thinned_to_means() -> None:
    steps, values = downsample(list(range(3000)), [float(n) for n in range(3000)])
    assert steps == list(range(0, 3000, 3))
    assert values == [n + 1.0 for n in steps]  # the first is of 0, 1, 2
    assert downsample([5, 7], [1.0, None]) == ([5, 7], [1.0, None])
    assert smooth([1.0, None, 1.0]) == [1.0, 1.0, 1.0]
    assert set(smooth([1e-4] * 50)) == {1e-4}  # without noise that a chart would magnify


@pytest.mark.parametrize("text", ["plain words", "naïve “quotes” — 你好 👩🏽‍🚀!", "", "\ufffd odd"])
def test_tokens_spell_the_text(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE_FOLDER / "tiny")
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    decoder = Decoder(tokenizer, frozenset({tokenizer.eos_token_id}))
    ends = find_token_ends(decoder, [*ids, tokenizer.eos_token_id], whole)
    assert len(ends) == len(ids) + 1
    assert ends == sorted(ends)
    assert ends[-1] == len(whole)
    assert find_token_ends(decoder, ids, whole + " and more") == []


@given(
    lengths=st.lists(st.integers(0, 4000), min_size=1, max_size=40),
    room=st.integers(3_000, 60_000),
)
def test_a_page_has_whole_steps_from_the_first_to_the_last(lengths: list[int], room: int) -> None:
    """It has as many as there is room for, but at least the first and the last."""
    noise = random.Random(0)
    rows = [
        {
            "step": step, "prompt": "1 + 1 =", "answer": "2", "reward": 1.0, "advantage": 0.0,
            "completion": "".join(noise.choices(string.printable, k=length)), "tokens": length,
            "truncated": False, "failed": None,
        }
        for step, length in enumerate(lengths, 1) for _ in range(2)
    ]  # fmt: skip
    blocks = pack_blocks(group_by_step(rows), room)
    shown = [step for block in blocks for step in block.steps]
    assert shown == sorted(set(shown))
    assert {shown[0], shown[-1]} == {1, len(lengths)}
    packed = [row for block in blocks for row in unpack_samples(block)["facts"]]
    assert [row[0] for row in packed] == [step for step in shown for _ in range(2)]
    size = sum(len(block.packed) for block in blocks)
    assert size <= room or len(shown) <= 2
    if len(shown) < len(lengths):
        assert sum(len(block.packed) for block in pack_blocks(group_by_step(rows), 10**9)) > room
        spaces = [after - before for before, after in itertools.pairwise(shown)]
        assert max(spaces) - min(spaces) <= 1


def test_a_letter_a_token_says_its_width_and_its_kl() -> None:
    assert encode_widths([1, 1, 4]) == "$#&"
    assert encode_kl([0.0, 0.02, 0.03, -0.5, 7.0, -7.0]) == "PPQFx("


def unpack_samples(block: Block) -> dict[str, Any]:
    samples: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(block.packed)))
    return samples


def test_every_metric_that_a_run_logs_may_be_searched_by(short_run: Path) -> None:
    logged = {key for line in read_metrics(short_run) for key in line} - {"step"}
    assert len(logged) > 30
    for name in logged:
        check_metric(compose("experiment=smoke"), name, "hydra.sweeper.objectives")
    mix = compose("dataset=mix")
    for name in ("eval/accuracy_from_sums", "reward/from_differences"):
        check_metric(mix, name, "hydra.sweeper.objectives")
    with pytest.raises(ConfigError, match="no run logs this"):
        check_metric(mix, "eval/accuracy_from_products", "hydra.sweeper.objectives")
