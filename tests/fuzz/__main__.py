"""Batches of calls in processes of their own, so that a crash or a hang is caught with its seed; a table at the end."""

import argparse
import collections
import json
import subprocess
import sys

BATCH, SECONDS_A_BATCH = 500, 300


def work(seed: int, first: int, count: int, op: str | None) -> None:
    """In the child: a line before and a line after each call."""
    import torch

    from tests.fuzz.judge import judge

    torch.set_num_threads(1)
    for index in range(first, first + count):
        print(json.dumps({"start": index}), flush=True)
        print(json.dumps({"end": index, "verdict": judge(f"{seed}/{index}", op)}), flush=True)


def run_batch(options: argparse.Namespace, first: int, count: int) -> tuple[list, int]:
    """Verdicts of calls from `first` on, and the index to go on from."""
    command = [sys.executable, "-m", "tests.fuzz", "--seed", str(options.seed), "--work", str(first), str(count)]
    command += ["--op", options.op] if options.op else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_A_BATCH)
        output, how, notes = done.stdout, f"exit {done.returncode}", done.stderr
    except subprocess.TimeoutExpired as error:
        output, how, notes = (error.stdout or b"").decode(), "hang", ""
    verdicts, started = [], first
    for line in output.splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        started = entry.get("start", started)
        if "verdict" in entry:
            verdicts.append((entry["end"], entry["verdict"]))
    if len(verdicts) == count:
        return verdicts, first + count
    if not verdicts and not output:
        sys.exit(f"the batch did not start: {notes[-2000:]}")
    verdicts.append((started, ["?", "defect", "crash", f"{how}: {notes[-300:]}"]))
    return verdicts, started + 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--op", help="calls of this op alone")
    parser.add_argument("--only", type=int, metavar="INDEX", help="this call alone, in this process")
    parser.add_argument("--work", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.seed, *options.work, options.op)
        return 0
    if options.only is not None:
        from tests.fuzz.judge import judge

        print(*judge(f"{options.seed}/{options.only}", options.op), sep="\n")
        return 0
    table: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    index, defects = 0, 0
    while index < options.calls:
        verdicts, index = run_batch(options, index, min(BATCH, options.calls - index))
        for at, (op, verdict, kind, text) in verdicts:
            table[op][verdict] += 1
            if verdict == "defect":
                defects += 1
                chosen = f" --op {options.op}" if options.op else ""
                print(f"{op} {kind}: {text}\n    python -m tests.fuzz --seed {options.seed}{chosen} --only {at}",
                      flush=True)
    columns = ("right", "answered", "clear error", "defect")
    print(f"{'op':20}" + "".join(f"{column:>13}" for column in columns))
    total = sum(table.values(), collections.Counter())
    for op, row in [*sorted(table.items()), ("all", total)]:
        print(f"{op:20}" + "".join(f"{row[column]:13}" for column in columns))
    return 1 if defects else 0


if __name__ == "__main__":
    sys.exit(main())
