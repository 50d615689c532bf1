"""Gradients that are not finite: said at once, and a reason to stop when they go on."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from text3d_fast.errors import ModelError, ModelWarning

FIRST, LATER = 3, 50  # steps in a row without a finite gradient, before there was any and after
_LOOKS, _EVERY = 8, 25  # it looks at each of the first steps, then now and then: a look waits for a GPU


class FiniteWatch:
    """Told of each step which images' gradients are finite; ModelError when none has been for some steps in a row."""

    def __init__(self) -> None:
        self._steps, self._seen, self._said = 0, False, False
        self._row: Tensor | None = None

    def __call__(self, finite: Tensor, x: Tensor) -> None:
        """finite [B] bool; x [B, ...] what the gradients are of."""
        if finite.device.type == "meta":
            return
        row = finite.new_zeros((), dtype=torch.int64) if self._row is None else self._row
        self._row = torch.where(finite.any(), 0, row + 1)
        self._steps += 1
        if self._steps > _LOOKS and self._steps % _EVERY:
            return
        skipped = int(self._row)
        self._seen |= skipped < self._steps
        if skipped == 0:
            return
        if not bool(x.isfinite().all()):
            what = "the pictures given to the prior are not finite"
        else:
            what = ("the prior's answers are not finite: its weights hold NaN, or overflow in half precision "
                    "(prior.dtype=bfloat16 or float32 avoids that)")
        if skipped >= (LATER if self._seen else FIRST):
            raise ModelError(f"guidance: {what}; nothing was learned in {skipped} steps, so the run stops")
        if not self._said:
            self._said = True
            warnings.warn(f"guidance: {what}; such steps change nothing", ModelWarning, stacklevel=4)
