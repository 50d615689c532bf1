"""What models say while they are loaded and used: warnings and the lines of the log, as lines of a command."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def messages(say: Callable[[str], None]) -> Iterator[None]:
    """Within it, each model warning is said once, and each line that `text3d_fast` logs at INFO."""
    from text3d_fast.errors import ModelWarning

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(record.getMessage())

    logger, handler = logging.getLogger("text3d_fast"), Handler()
    level, said = logger.level, set()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place) -> None:
            if not issubclass(category, ModelWarning):
                others(message, category, *place)
            elif str(message) not in said:
                said.add(str(message))
                say(f"warning: {message}")

        warnings.showwarning = show
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
