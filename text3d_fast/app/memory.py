"""How the process gets its memory from the system."""

import ctypes
import os

# of <malloc.h>
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Let the C library keep what tensors free, for the next ones.

    glibc maps each large block anew and gives it back, so that the system clears and maps all pages of a step's tensors
    again in each step: a tenth of its time. Names of the environment that set the same are left alone; other C
    libraries know nothing of it.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    mallopt(_MMAP_THRESHOLD, 1 << 30)
    mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
