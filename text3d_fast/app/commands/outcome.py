"""Exit statuses, and the one sentence of a failure."""

from __future__ import annotations

import sys

USER_ERROR, EMPTY_MESH, INTERRUPTED = 2, 3, 130


def fail(message: str) -> int:
    """Say what is wrong with the request; returns the exit status for it."""
    print(f"error: {message}", file=sys.stderr)
    return USER_ERROR


def explain(error: Exception) -> int | None:
    """Say in one sentence what a run failed of; returns the exit status. None: not foreseen, so the traceback may help.
    """
    from text3d_fast.errors import EmptyMesh

    if isinstance(error, EmptyMesh):
        print(f"error: {error}", file=sys.stderr)
        return EMPTY_MESH
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _is_about_memory(text)):
        return fail("not enough memory" + (f" ({text.splitlines()[0][:200]})" if text else "") + ": choose smaller "
                    "settings, e.g. --set size=32 sampling.step=0.08, or free some")
    backend = isinstance(error, RuntimeError) and (type(error) is not RuntimeError or "backend" in text)
    return fail(text) if backend or isinstance(error, OSError | ValueError | ImportError) else None


def _is_about_memory(text: str) -> bool:
    return any(words in text for words in ("out of memory", "allocate memory", "not enough memory"))
