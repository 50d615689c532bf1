"""Exit statuses, and the one sentence of a failure."""

from __future__ import annotations

import os
import sys

from text3d_fast.errors import EmptyMesh, ProcessLost, is_out_of_memory

FAILED, USER_ERROR, EMPTY_MESH, INTERRUPTED = 1, 2, 3, 130


def fail(message: str) -> int:
    """Say what is wrong with the request; returns the exit status for it."""
    if os.environ.get("RANK", "0") == "0":  # of several processes, the first one speaks
        print(f"error: {message}", file=sys.stderr)
    return USER_ERROR


def explain(error: Exception) -> int | None:
    """Say in one sentence what a run failed of; returns the exit status. None: not foreseen, so the traceback may help.
    """
    text = " ".join(str(error).split()) if isinstance(error, OSError) else str(error)
    if isinstance(error, EmptyMesh):
        print(f"error: {text}", file=sys.stderr)
        return EMPTY_MESH
    if isinstance(error, ProcessLost):
        print(f"error: {text}", file=sys.stderr)
        return FAILED
    if is_out_of_memory(error):
        return fail("not enough memory" + (f" ({text.splitlines()[0][:200]})" if text else "") + ": choose smaller "
                    "settings, e.g. --set size=32 sampling.step=0.08, or free some")
    backend = isinstance(error, RuntimeError) and (type(error) is not RuntimeError or "backend" in text)
    return fail(text) if backend or isinstance(error, OSError | ValueError | ImportError) else None
