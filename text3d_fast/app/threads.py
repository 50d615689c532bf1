"""How the threads of the process wait for each other."""

import os


def sleep_when_waiting() -> None:
    """Let threads that wait for others sleep instead of spin. Call it before torch is loaded.

    torch and this package share one OpenMP runtime, GNU's. On its own it lets a waiting thread spin for milliseconds on
    a core that somebody else may need (benchmarks/bench_contention.py). Names of the environment that say something
    else are left alone.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
