"""Lines about long work: how far it is, now and then, in a log file and where no terminal shows a bar."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

LOG = "run.log"  # in the folder of whatever is made
EVERY = 15  # seconds


class Lines:
    """console   gets the lines unless it is a terminal; log  the file that they are appended to, None: none"""

    def __init__(self, console: Console, log: Path | None = None):
        self.console, self.log, self._said = console, log, 0.0

    def say(self, text: str, always: bool = False) -> None:
        """Only if the last one is 15 seconds old, or `always`."""
        if always or time.monotonic() - self._said > EVERY:
            self._said = time.monotonic()
            self.note(text)
            if not self.console.is_terminal:
                show(self.console, text)

    def note(self, text: str) -> None:
        """Into the log alone. One that cannot be written is no reason to lose the work."""
        if self.log is not None:
            with contextlib.suppress(OSError), open(self.log, "a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def show(console: Console, text: str, style: str | None = None) -> None:
    """A line as it is: brackets in a prompt are no markup."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
