"""`text3d-fast doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from text3d_fast.app.commands.outcome import fail


@dataclass
class Doctor:
    """Say which backend serves which op on this machine, and why not the others; describe a model.

    Examples:
      text3d-fast doctor
      text3d-fast doctor --model path/or/hub-id --device cuda --set prior.vae_slicing=true
    """

    model: Annotated[str | None, arg(metavar="MODEL")] = None
    """Also describe this model: what it predicts, shapes, the memory and time it will take, licence, what is missing.
    Nothing is loaded, and of a hub id no weights are fetched."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """For which memory and time are said; cuda may be asked for where there is none."""
    set: Annotated[tuple[str, ...], arg(metavar="NAME=VALUE ...")] = ()
    """How the model is loaded, as for generate: prior.dtype, prior.tiny_autoencoder, prior.lora and so on."""
    words: bool = False
    """Only list the words that the built-in models know."""

    def __call__(self) -> int:
        from text3d_fast.app import doctor as report
        from text3d_fast.app.commands.runs import parse_setting

        if self.words:
            return report.words()
        try:
            settings = dict(parse_setting(text) for text in self.set)
        except ValueError as error:
            return fail(str(error))
        return report.doctor(self.model, self.device, settings)
