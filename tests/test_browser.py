"""The pages in a real browser: drawings, clicks, and that nothing is fetched."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import copy_with_text
from tests.test_dashboard import outputs, serving

__all__ = ["outputs"]  # a fixture

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
]
ALL_DRAWN = (
    "[...document.querySelectorAll('.plot')].every((plot) => plot.querySelector('.main-svg'))"
)
ROOT = Path(__file__).parents[1]
HOSTILE = "<img src=x onerror='window.hacked=1'></script><script>window.hacked=1</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[[Path | str], Any]]:
    """Opens a page; at the end, its console must have no error and it must have fetched nothing.

    A page that is served must have fetched nothing from another address.
    """
    context = browser.new_context()
    context.set_default_timeout(120_000)
    trouble: list[str] = []
    inside = ["file://", "blob:", "data:"]

    def go(place: Path | str) -> Any:
        if isinstance(place, str):
            inside.append(place)
        page = context.new_page()
        page.on("console", lambda m: m.type == "error" and trouble.append(m.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on(
            "request",
            lambda r: r.url.startswith(tuple(inside)) or trouble.append(r.url),
        )
        page.goto(place if isinstance(place, str) else place.absolute().as_uri())
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
        rows for (_, prompt), rows in groups.items()
        if word in prompt or any(word in row["completion"] for row in rows)
    ]  # fmt: skip
    count = f"{len(with_word)} of {len(groups)} groups"
    page.wait_for_function(
        "count => document.querySelector('#completions .found').textContent === count", arg=count
    )
    section.get_by_role("combobox", name="Groups", exact=True).select_option("mixed")
    mixed = [rows for rows in with_word if len({row["reward"] for row in rows}) > 1]
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


def test_colours_keep_to_their_tokens_behind_any_letter(
    short_run: Path, tmp_path: Path, opened: Callable[[Path], Any]
) -> None:
    from grpo.report.run.page import write_run_page

    copy_with_text(short_run, tmp_path / "run", "\U0001f600 is good")
    file = tmp_path / "run/completions.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    tokens = {"token_ends": [1, 4, 9], "token_kl": [0.5, -0.5, 1.0], "tokens": 3}
    file.write_text("".join(json.dumps(row | tokens) + "\n" for row in rows))
    page = opened(write_run_page(tmp_path / "run"))
    first = page.locator("#completions .completion .text").first
    first.wait_for()
    assert first.locator("span").all_inner_texts() == ["\U0001f600", " is", " good"]


def test_a_narrow_page_does_not_scroll_sideways(
    short_run: Path, opened: Callable[[Path], Any]
) -> None:
    page = opened(short_run / "report.html")
    page.set_viewport_size({"width": 390, "height": 800})
    page.locator("#completions .completion").first.wait_for()
    page.wait_for_function("document.documentElement.scrollWidth <= 390")  # its charts follow


def test_a_sweeps_page_is_drawn(tmp_path: Path, opened: Callable[[Path], Any]) -> None:
    from conftest import run_grpo

    done = run_grpo(
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


def test_the_dashboard_leads_to_every_page(
    outputs: Path, opened: Callable[[Path | str], Any]
) -> None:
    with serving(outputs) as address:
        page = opened(address)
        page.get_by_role("link", name="day/run", exact=True).click()
        page.locator("#completions .completion").first.wait_for()
        page.wait_for_selector(".plot .main-svg")
        page.go_back()
        page.get_by_role("link", name="sweeps/day/search", exact=True).click()
        page.locator("h2", has_text="Ranking").wait_for()
        page.go_back()
        page.get_by_role("link", name="1", exact=True).click()
        page.wait_for_selector(".plot .main-svg")
        page.go_back()
        page.get_by_role("link", name="in optuna-dashboard", exact=True).click()
        page.get_by_text("sweeps/day/search").first.wait_for()
        page.wait_for_selector(".js-plotly-plot .main-svg")
        page.goto(address)
        page.get_by_role("link", name="Runs in Trackio").click()
        page.get_by_text("smoke-").first.wait_for()
        page.close()  # it reloads again and again


@pytest.mark.parametrize("tokens", [200, 800])
def test_a_long_run_makes_a_page_of_bearable_size(
    tokens: int,
    short_run: Path,
    tmp_path: Path,
    opened: Callable[[Path], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """2,000 steps and 20,000 completions give at most 15 MB, and any step can be shown."""
    from grpo.report.run.page import write_run_page

    monkeypatch.syspath_prepend(str(ROOT / "scripts/benchmark"))
    from pages import stretch

    stretch(short_run, tmp_path / "run", tokens)
    report = write_run_page(tmp_path / "run")
    assert report.stat().st_size <= 15e6
    page = opened(report)
    section = page.locator("#completions")
    section.locator(".completion").first.wait_for()
    assert section.locator(".step output").inner_text() == "2000"
    left_out = section.get_by_text("They are of").is_visible()
    assert left_out == (tokens == 800)
    section.locator("input[type=range]").fill("0")
    section.locator("summary b", has_text=re.compile("^step 1$")).first.wait_for()
    section.get_by_role("combobox", name="In", exact=True).select_option("all")
    section.locator("button.more").wait_for()  # once all of it is unpacked
