"""The pages in a real browser: what is drawn, what can be clicked, and that nothing is fetched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import copy_with_text

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
]
ALL_DRAWN = (
    "[...document.querySelectorAll('.plot')].every((plot) => plot.querySelector('.main-svg'))"
)
HOSTILE = "<img src=x onerror='window.hacked=1'></script><script>window.hacked=1</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[[Path], Any]]:
    """Opens a page; at the end, its console must have no error and nothing was asked for."""
    context = browser.new_context()
    trouble: list[str] = []

    def go(file: Path) -> Any:
        page = context.new_page()
        page.on("console", lambda m: m.type == "error" and trouble.append(m.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on(
            "request",
            lambda r: r.url.startswith(("file://", "blob:", "data:")) or trouble.append(r.url),
        )
        page.goto(file.absolute().as_uri())
        return page

    yield go
    context.close()
    assert not trouble


def test_a_runs_charts_are_drawn(short_run: Path, opened: Callable[[Path], Any]) -> None:
    page = opened(short_run / "report.html")
    places = page.locator(".plot")
    assert places.count() > 10
    for n in range(places.count()):
        places.nth(n).scroll_into_view_if_needed()
    page.wait_for_function(ALL_DRAWN)
    drawn = page.locator("figure", has_text="Accuracy").first.locator(".scatterlayer .js-line")
    assert drawn.count() == 3


def test_completions_are_browsed(short_run: Path, opened: Callable[[Path], Any]) -> None:
    rows = [json.loads(line) for line in (short_run / "completions.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["step"] == 6]
    page = opened(short_run / "report.html")
    section = page.locator("#completions")
    section.locator(".completion").first.wait_for()
    assert section.locator(".completion").count() == len(last)
    texts = section.locator(".completion .text").all_inner_texts()
    assert [t.strip() for t in texts] == [row["completion"].strip() for row in last]
    assert section.locator(".completion .text span[title]").count() > 0  # coloured by KL

    section.locator("input[type=range]").fill("0")
    first = [row for row in rows if row["step"] == 1]
    assert section.locator(".step output").inner_text() == "1"
    assert section.locator(".completion").count() == len(first)

    section.get_by_role("combobox", name="In", exact=True).select_option("all")
    word = first[0]["answer"]
    section.locator("input[type=search]").fill(word)
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["step"], row["prompt"]), []).append(row)
    with_word = [
        own for (_, prompt), own in groups.items()
        if word in prompt or any(word in row["completion"] for row in own)
    ]  # fmt: skip
    told = f"{len(with_word)} of {len(groups)} groups"
    page.wait_for_function(
        "told => document.querySelector('#completions .found').textContent === told", arg=told
    )
    section.get_by_role("combobox", name="Groups", exact=True).select_option("mixed")
    mixed = [own for own in with_word if len({row["reward"] for row in own}) > 1]
    assert section.locator(".found").inner_text() == f"{len(mixed)} of {len(groups)} groups"


def test_before_and_after_are_filtered(short_run: Path, opened: Callable[[Path], Any]) -> None:
    rows = [json.loads(line) for line in (short_run / "evaluations.jsonl").read_text().splitlines()]
    before, after = ([row["right"] for row in rows if row["step"] == step] for step in (0, 6))
    both = sum(a and b for a, b in zip(before, after, strict=True))
    page = opened(short_run / "report.html")
    section = page.locator("#answers")
    section.get_by_role("combobox", name="Prompts", exact=True).select_option("right")
    label = section.locator("option[value=right]").inner_text()
    assert label == f"right both times ({both})"
    assert section.locator(".group").count() == min(12, both)
    if both > 12:
        section.locator("button.more").click()
        assert section.locator(".group").count() == min(24, both)


def test_hostile_text_does_nothing(
    short_run: Path, tmp_path: Path, opened: Callable[[Path], Any]
) -> None:
    from grpo.report.run.page import write_run_page

    copy_with_text(short_run, tmp_path / "run", HOSTILE)
    page = opened(write_run_page(tmp_path / "run"))
    page.locator("#completions .completion").first.wait_for()
    assert page.locator("#completions .completion .text").first.inner_text().strip() == HOSTILE
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0


def test_a_narrow_page_does_not_scroll_sideways(
    short_run: Path, opened: Callable[[Path], Any]
) -> None:
    page = opened(short_run / "report.html")
    page.set_viewport_size({"width": 390, "height": 800})
    page.locator("#completions .completion").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_sweeps_page_is_drawn(tmp_path: Path, opened: Callable[[Path], Any]) -> None:
    from conftest import grpo_process

    done = grpo_process(
        "-m", "experiment=smoke", "tracking=none", "kl_weight=0,0.1", "seed=0,1",
        "sweep_dir=sweep", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = opened(tmp_path / "sweep/report.html")
    places = page.locator(".plot")
    for n in range(places.count()):
        places.nth(n).scroll_into_view_if_needed()
    page.wait_for_function(ALL_DRAWN)
    assert page.locator("h2", has_text="Ranking").count() == 1


def test_a_long_run_makes_a_page_of_bearable_size(
    short_run: Path, tmp_path: Path, opened: Callable[[Path], Any]
) -> None:
    """2,000 steps and 20,000 completions: at most 15 MB."""
    from grpo.report.run.page import write_run_page

    shutil.copytree(short_run, tmp_path / "run", symlinks=True)
    metrics = [json.loads(line) for line in (short_run / "metrics.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (short_run / "completions.jsonl").read_text().splitlines()]
    steps = [line for line in metrics if "reward/mean" in line]
    with (tmp_path / "run/metrics.jsonl").open("w") as file:
        for n in range(1, 2001):
            line = {**steps[n % len(steps)], "step": n}
            line |= {k: v * (1 + n % 97 / 1000) for k, v in line.items() if isinstance(v, float)}
            file.write(json.dumps(line) + "\n")
    with (tmp_path / "run/completions.jsonl").open("w") as file:
        for n in range(20_000):
            row = rows[n % len(rows)]
            kl = [round(x + (n * 7 + k * 13) % 101 / 300, 3) for k, x in enumerate(row["token_kl"])]
            words = f"{row['completion']} {n * 7919 % 100_003}"
            own = {**row, "step": 1 + n // 10, "token_kl": kl, "completion": words}
            file.write(json.dumps(own) + "\n")
    report = write_run_page(tmp_path / "run")
    assert report.stat().st_size <= 15e6
    page = opened(report)
    page.locator("#completions .completion").first.wait_for()
