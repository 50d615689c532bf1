"""How the threads of the process wait for each other."""

import os

# Turns, then sleep: longer than most waits within an op, and shorter than what it takes to be scheduled again
SPINS = 2000


def spin_briefly() -> None:
    """Let threads that wait for others spin a little, then sleep. Call it before torch is loaded.

    torch and this package share one OpenMP runtime, GNU's. On its own it lets a waiting thread spin for milliseconds on
    a core that somebody else may need; sleeping at once costs a single run two thirds of its speed
    (benchmarks/bench_contention.py). Names of the environment that say something else are left alone.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
