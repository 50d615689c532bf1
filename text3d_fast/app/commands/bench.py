"""`text3d-fast bench`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from text3d_fast.app.commands.outcome import fail


@dataclass
class Bench:
    """Measure the speed of the ops, beside the peers that are installed (pytest benchmarks --benchmark-only)."""

    only: Annotated[str | None, arg(metavar="NAME")] = None
    """Only benchmarks whose name contains this."""
    csv: Annotated[Path | None, arg(metavar="FILE")] = None
    """Write the table there as well."""

    def __call__(self) -> int:
        import importlib.util
        import subprocess

        folder = Path(__file__).resolve().parents[3] / "benchmarks"
        if not folder.is_dir():
            return fail("the benchmarks come with the source tree: clone the repository and `pip install -e .[bench]`")
        if importlib.util.find_spec("pytest_benchmark") is None:
            return fail("pytest-benchmark is not installed: pip install -e .[bench]")
        command = [sys.executable, "-m", "pytest", str(folder), "--benchmark-only", "-rs"]
        if self.only:
            command += ["-k", self.only]
        if self.csv:
            data = self.csv.with_suffix(".json")
            command.append(f"--benchmark-json={data}")
        status = subprocess.call(command, cwd=folder.parent)
        if status == 5:  # pytest's word for "no tests"
            return fail(f"--only {self.only}: no benchmark's name contains it; they are those of benchmarks/bench_*.py")
        if self.csv and data.is_file():
            write_benchmark_csv(data, self.csv)
        return status


def write_benchmark_csv(data: Path, path: Path) -> None:
    """pytest-benchmark's JSON as a table: name, group, times in seconds, rounds."""
    import csv
    import json

    rows = json.loads(data.read_text(encoding="utf-8"))["benchmarks"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "group", "min", "median", "mean", "stddev", "rounds"])
        for row in rows:
            stats = row["stats"]
            writer.writerow([row["name"], row["group"], *(stats[k] for k in ("min", "median", "mean", "stddev")),
                             stats["rounds"]])
