"""Keeps what the six runs give now."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.golden import MACHINE, RUNS, describe_machine, locate_golden_file, record

for name in RUNS:
    with tempfile.TemporaryDirectory() as folder:
        lines = record(name, Path(folder))
    locate_golden_file(name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{locate_golden_file(name)}: {len(lines)} lines")
MACHINE.write_text(json.dumps(describe_machine(), indent=2) + "\n")
