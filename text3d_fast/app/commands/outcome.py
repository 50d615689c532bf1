"""Exit statuses, and the one sentence of a failure."""

import sys

USER_ERROR, EMPTY_MESH, INTERRUPTED = 2, 3, 130


def fail(message: str) -> int:
    """Say what is wrong with the request; returns the exit status for it."""
    print(f"error: {message}", file=sys.stderr)
    return USER_ERROR
