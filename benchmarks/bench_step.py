"""Where a step of DreamFusion goes, by part: `python benchmarks/bench_step.py [--model analytic] [--steps 60]`.

Parts are timed by wrapping them, on the default settings, after a tenth of the steps: medians in milliseconds. They
are appended to results/step.csv.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from text3d_fast.pipelines import DreamFusion
from text3d_fast.scene.volume_renderer import VolumeRenderer

RESULTS = Path(__file__).with_name("results") / "step.csv"


def profile(model: str, steps: int, prompt: str) -> dict[str, float]:
    """Milliseconds of each part: the median over the later nine tenths of the steps."""
    spent: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                spent[name].append(time.perf_counter() - started)

        return run

    last = time.perf_counter()

    def every_step(step: int, state: Any) -> None:
        nonlocal last
        now = time.perf_counter()
        if step == 1:  # everything exists now
            stage = state.stage
            stage.distill = timed("prior and its score", stage.distill)
            stage.optimizer.step = timed("Adam", stage.optimizer.step)
            stage._prepare_step = timed("occupancy, learning rates", stage._prepare_step)
            stage.sample_cameras = timed("cameras", stage.sample_cameras)
        else:
            spent["whole step"].append(now - last)
        last = time.perf_counter()

    wrapped = {"__call__": "rendering forward", "march": "of which marching"}
    originals = {name: getattr(VolumeRenderer, name) for name in wrapped}
    backward = torch.Tensor.backward
    try:
        for name, part in wrapped.items():
            setattr(VolumeRenderer, name, timed(part, originals[name]))
        torch.Tensor.backward = timed("backward", backward)
        DreamFusion(model, "cpu").run(prompt, steps, callback=every_step)
    except RuntimeError as error:  # few steps may leave no surface: the timings are there by then
        print(f"(no mesh: {error})")
    finally:
        torch.Tensor.backward = backward
        for name, call in originals.items():
            setattr(VolumeRenderer, name, call)
    found = {name: 1000 * statistics.median(times[max(1, steps // 10):steps]) for name, times in spent.items()
             if len(times) > steps // 5}
    parts = sum(ms for name, ms in found.items() if name not in ("whole step", "of which marching"))
    return found | {"the rest": found["whole step"] - parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="toybox")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompt", default="a red mug")
    given = parser.parse_args()
    found = profile(given.model, given.steps, given.prompt)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["date", "threads", "model", "part", "ms"])
        for name, ms in sorted(found.items(), key=lambda item: -item[1]):
            print(f"{name:28} {ms:8.2f} ms")
            writer.writerow([date.today(), torch.get_num_threads(), given.model, name, round(ms, 3)])


if __name__ == "__main__":
    main()
