"""Trackio: a dashboard on this machine, without an account. `grpo dashboard` opens it."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.config.schema import flatten_config
from grpo.config.validation import check_writable
from grpo.errors import ConfigError
from grpo.tracking.tracker import CompletionRow, Metrics, RunInfo, Sink, select_finite

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


class Trackio(Sink):
    """One Trackio run for one run here; a resumed one goes on in it, less the steps it redoes."""

    def __init__(
        self, info: RunInfo, project: str, folder: str, group: str | None, table_every: int
    ) -> None:
        """folder: where the database is; all runs that are to be compared share it.

        Raises:
            ConfigError: the folder can't be written, or this process has written to another one.
        """
        place = Path(folder).expanduser().absolute()
        check_writable(place, "tracking.trackio.folder")
        os.environ["TRACKIO_DIR"] = str(place)  # which it reads once, when it is imported
        import trackio

        if place != trackio.utils.TRACKIO_DIR:
            raise ConfigError(
                f"tracking.trackio.folder={folder}: Trackio writes to {trackio.utils.TRACKIO_DIR} "
                f"in this process already; one folder for all jobs of a sweep."
            )

        self.table_every = table_every
        self.pending: dict[str, Any] = {}  # of the step under way, so that it is logged at once
        name = f"{info.name}-{info.id}"  # Trackio tells runs apart by their names
        history = pop_run(project, name) if info.first_step else []
        with redirect_stdout(io.StringIO()):  # what it has to say is said at the end
            self.run = trackio.init(
                project=project,
                name=name,
                group=group or info.group,
                config={
                    **flatten_config(info.config),
                    "git_commit": info.commit,
                    "folder": str(info.folder),
                },
                embed=False,
            )
        for step, line in history:
            if step <= info.logged_step:
                self.run.log(line, step=step)

    def log(self, step: int, metrics: Metrics) -> None:
        self.run.log({**metrics, **self.pending}, step=step)
        self.pending = {}

    def log_completions(self, rows: Sequence[CompletionRow]) -> None:
        import trackio

        if rows and self.table_every and rows[0].step % self.table_every == 0:
            flat_rows = [row.to_table_row() for row in rows]
            table = trackio.Table(
                columns=list(flat_rows[0]), data=[list(row.values()) for row in flat_rows]
            )
            self.pending["completions"] = table

    def log_distributions(self, step: int, values: Mapping[str, Tensor]) -> None:
        import trackio

        found = {name: select_finite(own) for name, own in values.items()}
        self.pending |= {name: trackio.Histogram(own.numpy()) for name, own in found.items()}

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        import trackio

        with redirect_stdout(io.StringIO()):
            trackio.finish()
        log.info("Trackio has it; to see it: grpo dashboard")


def pop_run(project: str, name: str) -> list[tuple[int, dict[str, Any]]]:
    """Takes a run out of Trackio and returns what it had logged, by step."""
    from trackio.sqlite_storage import SQLiteStorage

    lines = SQLiteStorage.get_logs(project, name)
    SQLiteStorage.delete_run(project, name)
    meta = ("step", "timestamp")
    return [
        (line["step"], {key: value for key, value in line.items() if key not in meta})
        for line in lines
    ]
