"""Several runs at once on one machine: `python benchmarks/bench_contention.py [--runs 1 2] [--seconds 8]`.

Each run is a process that takes steps of DreamFusion with the exact prior, with as many threads as there are cores, for
some seconds after all have begun. Compared are ways in which the OpenMP runtime's threads wait for each other: on its
own, it lets them spin, and a thread that spins keeps the core from the one that it waits for; "spin 2000" is what
the command line sets. Medians of a step in milliseconds are appended to results/contention.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from itertools import pairwise
from pathlib import Path

RESULTS = Path(__file__).with_name("results") / "contention.csv"
WAYS = {
    "libgomp's own": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}, "active": {"OMP_WAIT_POLICY": "ACTIVE"},
    **{f"spin {count}": {"GOMP_SPINCOUNT": str(count)} for count in (1000, 2000, 4000, 10_000)},
}
WARM_UP = 5


def work(folder: Path, number: int, runs: int, seconds: float) -> None:
    """One run; prints its milliseconds a step."""
    from text3d_fast.errors import Interrupted
    from text3d_fast.pipelines import DreamFusion

    times: list[float] = []
    ready = 0.0

    def step(count: int, state) -> None:
        nonlocal ready
        if count == WARM_UP:
            (folder / str(number)).touch()
            while len(list(folder.iterdir())) < runs:
                time.sleep(0.01)
            ready = time.perf_counter()
        if count >= WARM_UP:
            times.append(time.perf_counter())
            if times[-1] - ready > seconds and len(times) > 3:
                state.stop()

    try:
        DreamFusion("analytic", "cpu", settings={"steps": 100_000}).run("a red mug", callback=step)
    except Interrupted:
        print(1e3 * statistics.median(b - a for a, b in pairwise(times)))


def measure(runs: int, way: dict[str, str], seconds: float) -> list[float]:
    """Milliseconds a step of each of so many runs at once."""
    known = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in known} | way
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--worker", folder, "--runs", str(runs), "--seconds", str(seconds)]
        workers = [subprocess.Popen([*command, "--number", str(k)], env=environment, stdout=subprocess.PIPE, text=True)
                   for k in range(runs)]
        return [float(worker.communicate()[0]) for worker in workers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options.worker, options.number, options.runs[0], options.seconds)
        return
    RESULTS.parent.mkdir(exist_ok=True)
    fresh = not RESULTS.exists()
    with open(RESULTS, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(["date", "cores", "waiting", "runs at once", "ms a step, each", "slowest / alone"])
        for name in options.ways:
            alone = None
            for runs in options.runs:
                found = measure(runs, WAYS[name], options.seconds)
                alone = alone or found[0]
                row = [name, runs, " ".join(f"{value:.1f}" for value in found), f"{max(found) / alone:.2f}"]
                writer.writerow([date.today().isoformat(), os.cpu_count(), *row])
                file.flush()
                print(*row, sep="  ", flush=True)


if __name__ == "__main__":
    main()
