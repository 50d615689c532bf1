"""Everything that only a GPU can tell, in one command:

    python -m benchmarks.device --out DIR [--stage NAME ...] [--device cpu] [--again]

Each stage is a process of its own that ends within 8 minutes; what is finished is skipped when the command runs again,
until the commit or the device changes. DIR gets a CSV a stage (each row with device, versions and commit), a log a
stage and state.json; a short table comes last. With --device cpu every stage that a CPU can do runs small.
"""

import argparse
import csv
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 480  # seconds a stage
FIGURES = ("p50_ms", "GB/s", "launches", "synchronizations")  # of the table
REPEATS = {"cuda": 100, "cpu": 5}


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def identity(device: str) -> dict[str, str]:
    """What every row says about where it was measured."""
    import platform

    import torch

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    commit = git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    return {"device": name, "torch": torch.__version__, "cuda": str(torch.version.cuda), "triton": triton_version,
            "python": platform.python_version(), "commit": commit}


def write_rows(out: Path, stage: str, device: str, rows: list[dict]) -> None:
    """All rows of a stage, with one header; a figure that there is none of is empty."""
    about = {"date": datetime.date.today().isoformat(), **identity(device)}
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(out / f"{stage}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*about, *columns], restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({**about, **{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}})


def quantiles(run, device: str, seconds: float = 1.0) -> dict[str, float]:
    """p20, p50 and p80 of a call, ms: CUDA events with a cold L2 cache, or the clock of a CPU."""
    import torch

    times, repeats = [], REPEATS[device]
    for _ in range(3 if device == "cuda" else 1):
        run()
    if device == "cpu":
        end = time.perf_counter() + seconds
        while len(times) < 2 or (len(times) < repeats and time.perf_counter() < end):
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
    else:
        flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) for start, end in events]
    p20, p50, p80 = (statistics.quantiles(times, n=10)[i] for i in (1, 4, 7))
    return {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80}


def replayed(run):
    """run captured as a CUDA graph: a callable that replays it."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    return lambda: (graph.replay(), kept)


def launches(run) -> dict[str, int]:
    """Kernels and copies that one call launches, and how often it waits for the device."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        run()
    names = [event.name for event in record.events()]
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
    on_device = [e for e in record.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return {"launches": len(on_device), "synchronizations": sum(name in waits for name in names) - 1}  # profile's own


def check(case, device: str) -> None:
    """Against the reference; as in the ops' tests, which say where tolerances come from."""
    from text3d_fast import use_backend

    got = case.run()
    with use_backend("reference"):
        expected = case.run()
    for g, e in zip(got, expected):
        if not e.numel():
            continue
        scale = max(1.0, float(e.detach().double().abs().max()))
        if not float((g.detach().double() - e.detach().double()).abs().max()) <= 1e-3 * scale:
            raise AssertionError(f"{case.name}: differs from the reference")


# Stages: functions of (out, device), which return rows of a CSV, or raise. A missing tool is a row that says so.


def stage_build(out, device):
    environment = {**os.environ, "TEXT3D_CUDA": str(int(device == "cuda"))}
    start = time.perf_counter()
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, env=environment, check=True)
    from text3d_fast import native

    reason = native.reason_against(device)
    if reason:
        raise RuntimeError(reason)
    return [{"what": "build", "seconds": time.perf_counter() - start}]


def _pytest(*arguments: str):
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-6000:], done.stderr[-2000:])
    if done.returncode:
        raise RuntimeError(f"pytest {' '.join(arguments)}: {done.stdout.strip().splitlines()[-1]}")
    return [{"what": " ".join(arguments), "seconds": time.perf_counter() - start,
             "result": done.stdout.strip().splitlines()[-1]}]


def stage_tests_ops(out, device):
    if device == "cpu":
        return _pytest("tests/ops/test_composite.py", "-k", "matches_reference")
    return _pytest("tests/ops", "--timeout=120")


def stage_tests_others(out, device):
    if device == "cpu":
        return _pytest("tests/scene/test_capture.py", "-k", "guard_sees")
    return _pytest("tests", "--ignore=tests/ops", "--timeout=240")


def _small(device):
    from benchmarks import cases

    for make in cases.ALL:
        yield from make(device, True)


def _sanitized(device, tool):
    command = [sys.executable, "-m", "benchmarks.device", "--small-cases", "--device", device]
    sanitizer = shutil.which("compute-sanitizer")
    if device == "cuda" and sanitizer:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-6000:], done.stderr[-4000:])
    if done.returncode:
        raise RuntimeError(f"{tool}: exit status {done.returncode}: {(done.stdout + done.stderr)[-300:]}")
    if device == "cuda" and not sanitizer:
        return [{"what": tool, "result": "missing: compute-sanitizer is not on PATH"}]
    summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line] or ["small cases ran, not sanitized"]
    return [{"what": tool, "result": summary[-1].strip("= ")}]


def stage_memcheck(out, device):
    return _sanitized(device, "memcheck")


def stage_racecheck(out, device):
    return _sanitized(device, "racecheck")


def stage_roofline(out, device):
    """GB/s of a copy (read and written bytes counted), and of gathers of 8 and 32 bytes from random rows."""
    import torch

    count = 2**28 if device == "cuda" else 2**22
    source, target = torch.rand(count, device=device), torch.empty(count, device=device)
    times = quantiles(lambda: target.copy_(source), device)
    rows = [{"what": "copy", **times, "GB/s": 8 * count / times["p50_ms"] / 1e6}]
    for floats in (2, 8):
        table = source.view(-1, floats)
        index = torch.randint(len(table), (count // 16,), device=device)
        gathered = torch.empty(len(index), floats, device=device)
        times = quantiles(lambda t=table, i=index, g=gathered: torch.index_select(t, 0, i, out=g), device)
        moved = len(index) * (8 + 8 * floats)
        rows.append({"what": f"gather of {4 * floats} bytes", **times, "GB/s": moved / times["p50_ms"] / 1e6})
    return rows


def stage_ops(out, device):
    import torch

    from benchmarks import cases
    from text3d_fast import use_backend

    rows = []
    for make in cases.ALL:
        for case in make(device, True):
            check(case, device)
        backends = ("native",) if device == "cpu" else ("native", "triton")
        for backend in backends:
            with use_backend(backend):
                try:
                    measured = list(make(device, device == "cpu"))
                except RuntimeError as error:  # no twin
                    rows.append({"op": make.__name__, "backend": backend, "how": f"missing: {error}"})
                    continue
                for case in measured:
                    row = {"op": case.name, "backend": backend}
                    if device == "cuda":
                        torch.cuda.reset_peak_memory_stats()
                        before = torch.cuda.memory_allocated()
                        case.run()
                        row["peak_MB"] = (torch.cuda.max_memory_allocated() - before) / 1e6
                        row |= launches(case.run)
                    times = quantiles(case.run, device)
                    rows.append({**row, "how": "eager", **times, "GB/s": case.bytes / times["p50_ms"] / 1e6})
                    if device == "cuda" and case.capturable:
                        times = quantiles(replayed(case.run), device)
                        rows.append({**row, "how": "graph", **times, "GB/s": case.bytes / times["p50_ms"] / 1e6})
        write_rows(out, "ops", device, rows)  # what is known so far, should time run out
    return rows


def stage_peers(out, device):
    from benchmarks import peers

    rows = []
    for make in peers.ALL:
        try:
            what, ours, theirs, agree = make(device, device == "cpu")
            apart = agree(ours(), theirs())
        except ImportError as error:
            rows.append({"peer": make.__name__, "result": f"missing: {error}"})
            continue
        except Exception as error:  # a peer that fails says so, and the others go on
            rows.append({"peer": make.__name__, "result": f"failed: {error}"[:300]})
            continue
        for name, run in (("ours", ours), ("theirs", theirs)):
            rows.append({"peer": make.__name__, "what": what, "side": name, "result": f"apart {apart:.1e}",
                         **quantiles(run, device)})
    return rows


def stage_step(out, device):
    """A DreamFusion step in capacity mode, eager, and captured as one CUDA graph."""
    import torch

    from benchmarks.step import Step

    small = {"size": 8, "capacity": 4000, "log2_table_size": 12, "levels": 4} if device == "cpu" else {}
    rows = []
    for normals in (None, "analytic"):
        step = Step(device, normals=normals, **small)
        row = {"what": f"step, normals {normals}", **({} if device == "cpu" else launches(step.run))}
        losses = [float(step.run()) for _ in range(3)]
        if not all(map(torch.isfinite, torch.tensor(losses))):
            raise AssertionError(f"losses {losses}")
        rows.append({**row, "how": "eager", "overflow": bool(step.overflow), **quantiles(step.run, device)})
        if device == "cuda":
            eager, captured = Step(device, normals=normals), Step(device, normals=normals)
            graph = captured.capture()
            captured.refill(), eager.refill()
            eager.field.load_state_dict(captured.field.state_dict())
            graph.replay()
            expected, got = float(eager.gradient()), float(captured.loss)
            if not abs(expected - got) <= 1e-3 * max(1.0, abs(expected)):
                raise AssertionError(f"loss of the graph {got}, of the eager step {expected}")
            rows.append({**row, "how": "graph", "overflow": bool(captured.overflow), **quantiles(graph.replay, device)})
    return rows


STAGES = {name.removeprefix("stage_").replace("_", "-"): function for name, function in list(globals().items())
          if name.startswith("stage_")}


def run_stage(name: str, out: Path, device: str) -> None:
    write_rows(out, name, device, STAGES[name](out, device))


def table(out: Path, state: dict) -> str:
    lines = [f"{'stage':14} {'state':8} {'s':>5}"]
    for name in STAGES:
        entry = state.get(name, {"state": "not run", "seconds": 0})
        lines.append(f"{name:14} {entry['state']:8} {entry['seconds']:5.0f}  {entry.get('why', '')}"[:160])
    for name in ("roofline", "ops", "peers", "step"):
        path = out / f"{name}.csv"
        if state.get(name, {}).get("state") == "done" and path.exists():
            for row in csv.DictReader(path.open()):
                what = " ".join(row.get(k) or "" for k in ("what", "op", "peer", "backend", "side", "how", "result"))
                figures = " ".join(f"{row[k]:>9} {k}" for k in FIGURES if row.get(k))
                lines.append(f"  {name:9} {' '.join(what.split()):46} {figures}"[:160])
    return "\n".join(lines)


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for CSVs, logs and what is finished")
    parser.add_argument("--stage", action="append", choices=list(STAGES), help="only this one; may be repeated")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--again", action="store_true", help="also what is finished")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # the stage's own process
    parser.add_argument("--small-cases", action="store_true", help=argparse.SUPPRESS)  # what a sanitizer looks at
    options = parser.parse_args(argv)
    if options.out is None and not options.small_cases:
        parser.error("the following arguments are required: --out")
    return options


def main(argv=None) -> int:
    options = parse(argv)
    if options.small_cases:
        for case in _small(options.device):
            check(case, options.device)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = options.stage or list(STAGES)
    if options.inside:
        run_stage(wanted[0], options.out, options.device)
        return 0
    path = options.out / "state.json"
    state = json.loads(path.read_text()) if path.exists() else {}
    about = identity(options.device)
    for name in wanted:
        if not options.again and state.get(name, {}).get("state") == "done" and state[name]["about"] == about:
            print(f"{name}: finished before", flush=True)
            continue
        print(f"{name} ...", flush=True)
        command = [sys.executable, "-m", "benchmarks.device", "--inside", "--stage", name, "--out",
                   str(options.out.resolve()), "--device", options.device]
        start, why = time.perf_counter(), ""
        with open(options.out / f"{name}.log", "w") as log:
            try:
                code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, timeout=LIMIT).returncode
            except subprocess.TimeoutExpired:
                code, why = 124, f"over {LIMIT} s"
        if code and not why:
            why = (options.out / f"{name}.log").read_text().strip().rpartition("\n")[2]
        state[name] = {"state": "failed" if code else "done", "seconds": time.perf_counter() - start, "why": why,
                       "about": about}
        path.write_text(json.dumps(state, indent=1))
    print(table(options.out, state))
    return int(any(state[name]["state"] == "failed" for name in wanted))


if __name__ == "__main__":
    sys.exit(main())
