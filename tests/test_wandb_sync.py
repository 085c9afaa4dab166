"""A run that was resumed offline, uploaded by `wandb sync` to a server in this test."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_grpo
from tests.servers import RequestHandler, serving

JOB = ("experiment=smoke", "tracking=wandb", "eval.samples=1", "dataset.eval_slice=:16")


class Server(ThreadingHTTPServer):
    """The parts of W&B that an upload needs: one project, and the history of each run."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.histories: dict[str, list[dict[str, Any]]] = {}


class Answers(RequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.read_body()
        if self.path == "/graphql":
            request = json.loads(body)
            found = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
            name = found[1] if found else ""
            content = getattr(self, name, lambda variables: {})(request.get("variables") or {})
            self.answer_json({"data": content})
        elif streamed := re.search(r"/([^/]+)/file_stream", self.path):
            files = json.loads(body).get("files") or {}
            if part := files.get("wandb-history.jsonl"):
                history = self.server.histories[streamed[1]]
                history[part["offset"] :] = map(json.loads, part["content"])
            self.answer_json({"exitcode": None, "limits": {}})
        else:
            self.answer_json({})

    def do_PUT(self) -> None:
        self.read_body()
        self.answer_json({})

    def RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        history = self.server.histories.get(variables["name"])
        bucket = None if history is None else self.describe_run(variables["name"])
        return {"model": {**PROJECT, "bucket": bucket}}

    def UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        fresh = variables["name"] not in self.server.histories
        self.server.histories.setdefault(variables["name"], [])
        bucket = {**self.describe_run(variables["name"]), "project": PROJECT, "sweepName": None}
        return {"upsertBucket": {"bucket": bucket, "inserted": fresh}}

    def CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": f, "uploadUrl": f"{self.server.address}/{f}"} for f in variables["files"]]
        return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}

    def describe_run(self, name: str) -> dict[str, Any]:
        """Returns a run as the server has it so far."""
        history = self.server.histories[name]
        return {
            "id": name, "name": name, "displayName": name, "description": None, "config": "{}",
            "summaryMetrics": "{}", "logLineCount": 0, "historyLineCount": len(history),
            "eventsLineCount": 0, "eventsTail": "[]", "tags": [], "wandbConfig": '{"t": 1}',
            "historyTail": json.dumps([json.dumps(line) for line in history[-1:]]),
        }  # fmt: skip


PROJECT = {"id": "1", "name": "grpo-bench", "entity": {"id": "1", "name": "me"}}


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as server:
        yield server


@pytest.mark.slow
def test_both_parts_of_a_run_resumed_offline_reach_one_run_of_wandbs(
    server: Server, tmp_path: Path
) -> None:
    """Uploaded with the logged command, its history has every step once, with its numbers."""
    assert run_grpo(*JOB, "max_steps=2", "hydra.run.dir=run", cwd=tmp_path).returncode == 0
    done = run_grpo("resume=run", "max_steps=4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (command,) = re.findall(r"to upload: (wandb sync .*)", done.stderr)
    uploaded = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)], cwd=tmp_path, capture_output=True, text=True,
        timeout=120,
        env={**os.environ, "WANDB_BASE_URL": server.address, "WANDB_API_KEY": "0" * 40},
    )  # fmt: skip
    assert uploaded.returncode == 0, uploaded.stderr
    (history,) = server.histories.values()
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    written = {line["step"]: line for line in lines}
    assert [line["_step"] for line in history] == [0, 1, 2, 3, 4]
    for line in history:
        known = written[line["_step"]]
        assert {key: line[key] for key in known} == known
