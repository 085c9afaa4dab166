"""How long a large run's page takes: to write, and to open in a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STEPS, COMPLETIONS, TIMES = 2000, 20_000, 5


def page(work: Path) -> dict[str, Any]:
    """Seconds until the first charts are drawn and the last step's completions are there.

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
    stretch(work / "run", work / "long")
    from grpo.report.run.page import write_run_page

    began = time.perf_counter()
    report = write_run_page(work / "long")
    writing, opening = time.perf_counter() - began, []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(TIMES):
            opened = browser.new_page(viewport={"width": 1280, "height": 900})
            began = time.perf_counter()
            opened.goto(report.absolute().as_uri())
            opened.wait_for_selector(".plot .main-svg")
            opened.wait_for_selector("#completions .completion")
            opening.append(time.perf_counter() - began)
            opened.close()
        browser.close()
    return {
        "steps": STEPS,
        "completions": COMPLETIONS,
        "megabytes": report.stat().st_size / 1e6,
        "writing": writing,
        "opening": opening,
    }


def stretch(run: Path, to: Path) -> None:
    """Copies a short run as one of many steps and completions, no two lines the same."""
    shutil.copytree(run, to, symlinks=True)
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
            row = rows[n % len(rows)]
            kl = [round(x + (n * 7 + k * 13) % 101 / 300, 3) for k, x in enumerate(row["token_kl"])]
            words = f"{row['completion']} {n * 7919 % 100_003}"
            step = 1 + n * STEPS // COMPLETIONS
            file.write(
                json.dumps({**row, "step": step, "token_kl": kl, "completion": words}) + "\n"
            )
