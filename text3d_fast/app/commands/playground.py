"""`text3d-fast playground`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from text3d_fast.app.commands.outcome import fail
from text3d_fast.app.commands.runs import default_folder, model_settings


@dataclass
class Playground:
    """Compare sampling and distillation losses on pictures: what the loss does, without a 3D scene.

    Writes figure7.png (ancestral sampling, SDS, VSD, CSD, ISM and SDS-Bridge side by side), grid.png (the first three
    at several guidance weights), table.csv and table.json (saturation, sharpness, diversity) into the folder OUT.

    Examples:
      text3d-fast playground "a red mug"
      text3d-fast playground "a mug" --no-grid --count 8 --steps 300
    """

    prompt: Positional[Annotated[str, arg(metavar="PROMPT")]]
    """What the pictures show."""
    model: Annotated[str | None, arg(metavar="MODEL")] = None
    """The image prior, as for generate. Of a latent model, the latents are optimized."""
    set: Annotated[tuple[str, ...], arg(metavar="NAME=VALUE ...")] = ()
    """How the model is loaded, as for generate: prior.lora, prior.dtype, prior.prediction and so on."""
    count: int = 4
    """Pictures by each method."""
    steps: int = 80
    """Steps of each loss."""
    weights: tuple[float, ...] = (1.0, 3.0, 7.5, 30.0, 100.0)
    """Guidance weights of the grid, in the (1 + w) / w form."""
    no_grid: bool = False
    """Only the figure."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """The folder for the results; by default runs/playground-PROMPT."""
    quiet: bool = False
    """Print nothing but errors."""

    def __call__(self) -> int:
        from text3d_fast.app import playground as comparing
        from text3d_fast.errors import OutputError

        out = self.out or default_folder(f"playground {self.prompt}", False)
        try:
            return comparing.compare(self, out, model_settings(self.set))
        except (OutputError, ValueError) as error:
            return fail(str(error))
