"""How long a large run's page takes: to write, and to open in a browser."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

STEPS, COMPLETIONS, TIMES = 2000, 20_000, 5
TOKENS = (20, 200, 800)  # of each completion
LETTERS = (2, 3, 4, 5, 6)  # of a token
README = Path(__file__).parents[2] / "README.md"


def measure_pages(work: Path) -> dict[str, Any]:
    """By tokens a completion: seconds until the first charts and the last step's texts are there.

    Raises:
        SystemExit: there is no browser.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise SystemExit("scripts/bench page: needs playwright") from error
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("scripts/bench page: needs Debian's chromium")
    job = ["experiment=smoke", "tracking=none", "max_steps=6", "log_prompts=4", "hydra.run.dir=run"]
    subprocess.run([sys.executable, "-m", "grpo", *job], cwd=work, check=True, capture_output=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        measured = {tokens: measure_page(browser, work, tokens) for tokens in TOKENS}
        browser.close()
    return {"steps": STEPS, "completions": COMPLETIONS, "by_tokens": measured}


def measure_page(browser: Any, work: Path, tokens: int) -> dict[str, Any]:
    from grpo.report.run.page import write_run_page

    stretch(work / "run", work / f"of_{tokens}", tokens)
    began = time.perf_counter()
    report = write_run_page(work / f"of_{tokens}")
    writing, opening = time.perf_counter() - began, []
    for _ in range(TIMES):
        opened = browser.new_page(viewport={"width": 1280, "height": 900})
        began = time.perf_counter()
        opened.goto(report.absolute().as_uri())
        opened.wait_for_selector(".plot .main-svg")
        opened.wait_for_selector("#completions .completion")
        opening.append(time.perf_counter() - began)
        opened.close()
    return {"megabytes": report.stat().st_size / 1e6, "writing": writing, "opening": opening}


def stretch(run: Path, to: Path, tokens: int) -> None:
    """Copies a short run as one of many steps and completions, no two lines the same.

    A completion's words are drawn by how often the README has them; most tokens' KL is near
    nothing, a few tokens' is large.
    """
    shutil.copytree(run, to, symlinks=True)
    words, noise = README.read_text().split(), random.Random(0)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    steps = [line for line in metrics if "reward/mean" in line]
    with (to / "metrics.jsonl").open("w") as file:
        for n in range(1, STEPS + 1):
            line = {**steps[n % len(steps)], "step": n}
            line |= {k: v * (1 + n % 97 / 1000) for k, v in line.items() if isinstance(v, float)}
            file.write(json.dumps(line) + "\n")
    with (to / "completions.jsonl").open("w") as file:
        for n in range(COMPLETIONS):
            token_ends = list(accumulate(noise.choices(LETTERS, k=tokens)))
            text = " ".join(noise.choices(words, k=tokens))
            changes = {
                "step": 1 + n * STEPS // COMPLETIONS,
                "completion": text[: token_ends[-1]],
                "tokens": tokens,
                "token_ends": token_ends,
                "token_kl": [round(noise.gauss(0.0, 0.6) ** 3, 3) for _ in token_ends],
            }
            file.write(json.dumps({**rows[n % len(rows)], **changes}) + "\n")
