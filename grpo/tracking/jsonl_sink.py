"""metrics.jsonl, completions.jsonl, evaluations.jsonl: the data that all reports are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grpo.runs.jsonl import encode_line, reopen
from grpo.tracking.tracker import CompletionRow, Metrics, RunInfo, Sink


class JsonlFiles(Sink):
    """Appends a line per step and flushes it; a resumed run first drops the steps it repeats."""

    def __init__(self, info: RunInfo) -> None:
        self.metrics_file = reopen(info.folder / "metrics.jsonl", info.logged_step)
        self.completions_file = reopen(info.folder / "completions.jsonl", info.first_step)
        self.answers_file = reopen(info.folder / "evaluations.jsonl", info.logged_step)

    def log(self, step: int, metrics: Metrics) -> None:
        self.metrics_file.write(encode_line({"step": step, **metrics}))
        self.metrics_file.flush()

    def log_completions(self, rows: Sequence[CompletionRow]) -> None:
        for row in rows:
            tokens = {"token_ends": list(row.token_ends), "token_kl": list(row.token_kl)}
            self.completions_file.write(encode_line({**row.to_table_row(), **tokens}))
        self.completions_file.flush()

    def log_answers(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self.answers_file.writelines(encode_line({"step": step, **row}) for row in rows)
        self.answers_file.flush()

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        self.metrics_file.close()
        self.completions_file.close()
        self.answers_file.close()
