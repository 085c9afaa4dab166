"""Keeps what the six runs give now."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.golden import MACHINE, RUNS, golden_file, machine, record

for name in RUNS:
    with tempfile.TemporaryDirectory() as folder:
        lines = record(name, Path(folder))
    golden_file(name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{golden_file(name)}: {len(lines)} lines")
MACHINE.write_text(json.dumps(machine(), indent=2) + "\n")
