"""Trackio: a local dashboard that needs no account. `grpo dashboard` opens it."""

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
    """Records a run as one Trackio run; a resumed run continues it, less the steps it repeats."""

    def __init__(
        self, info: RunInfo, project: str, folder: str, group: str | None, table_every: int
    ) -> None:
        """folder: of the database; all runs that are to be compared share it.

        Raises:
            ConfigError: the folder can't be written, or this process already uses another one.
        """
        place = Path(folder).expanduser().absolute()
        check_writable(place, "tracking.trackio.folder")
        os.environ["TRACKIO_DIR"] = str(place)  # Trackio reads it once, at import
        import trackio

        if place != trackio.utils.TRACKIO_DIR:
            raise ConfigError(
                f"tracking.trackio.folder={folder}: Trackio writes to {trackio.utils.TRACKIO_DIR} "
                f"in this process already; use one folder for all jobs of a sweep.",
                key="tracking.trackio.folder",
                value=folder,
            )

        self.table_every = table_every
        self.pending: dict[str, Any] = {}  # of this step, logged with its metrics
        name = f"{info.name}-{info.id}"  # Trackio identifies runs by their names
        history = pop_run(project, name) if info.first_step else []
        with redirect_stdout(io.StringIO()):  # hides its messages; close() logs one
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

        found = {name: select_finite(tensor) for name, tensor in values.items()}
        self.pending |= {name: trackio.Histogram(finite.numpy()) for name, finite in found.items()}

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        import trackio

        with redirect_stdout(io.StringIO()):
            trackio.finish()
        log.info("Trackio recorded this run; to see it: grpo dashboard")


def pop_run(project: str, name: str) -> list[tuple[int, dict[str, Any]]]:
    """Removes a run from Trackio and returns its logged values with their steps."""
    from trackio.sqlite_storage import SQLiteStorage

    lines = SQLiteStorage.get_logs(project, name)
    SQLiteStorage.delete_run(project, name)
    meta = ("step", "timestamp")
    return [
        (line["step"], {key: value for key, value in line.items() if key not in meta})
        for line in lines
    ]
