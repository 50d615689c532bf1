"""`text3d-fast doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg


@dataclass
class Doctor:
    """Say which backend serves which op on this machine, and why not the others."""

    model: Annotated[str | None, arg(metavar="MODEL")] = None
    """Also describe this model: what it predicts, shapes, memory, licence. Nothing is loaded."""
    words: bool = False
    """Only list the words that the built-in models know."""

    def __call__(self) -> int:
        from text3d_fast.app import doctor as report

        return report.words() if self.words else report.doctor(self.model)
