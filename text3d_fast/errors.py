"""The errors that users meet; their messages say what is wrong and what to do."""

from __future__ import annotations


class ModelError(ValueError):
    """A model that is missing, broken or of an unsupported kind."""


class OutputError(OSError):
    """Something cannot be written or read: a full disk, a folder of somebody else's, a damaged file."""


class CheckpointError(OutputError):
    """A checkpoint that is missing, broken or of another run."""


class EmptyMesh(RuntimeError):
    """The scene has no surface: too little was asked of it, or the prior never liked anything."""


class ProcessLost(RuntimeError):
    """Another process of a job of several has ended, or does not answer."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came; `step` steps of the stage are done, and saved if there is a folder."""

    def __init__(self, step: int):
        super().__init__(f"interrupted after step {step}")
        self.step = step


class ModelWarning(UserWarning):
    """Something about a model, or about what was asked of it, that will make results worse."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says so, in whatever words: those of Python, of torch on either device, or of the loader."""
    if isinstance(error, MemoryError):
        return True
    words = ("out of memory", "allocate memory", "not enough memory", "bad_alloc", "failed to map segment")
    return isinstance(error, RuntimeError | OSError | ImportError) and any(some in str(error) for some in words)
