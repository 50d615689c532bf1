"""`text3d-fast evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from text3d_fast.app.commands.outcome import fail
from text3d_fast.app.commands.runs import model_settings


@dataclass
class Evaluate:
    """Measure the quality of generated meshes against the truth, over the built-in world.

    Examples:
      text3d-fast evaluate --quick
      text3d-fast evaluate --pipeline prolificdreamer --particles 4 --prompts "a mug"
      text3d-fast evaluate --model analytic --camera-only --seeds 0 --prompts "a red mug" "a blue chair"
    """

    quick: bool = False
    """A part of the suite, at most 20 minutes on 2 CPU cores: 4 prompts, seed 0, 300 steps."""
    pipeline: Literal["dreamfusion", "magic3d", "prolificdreamer"] = "dreamfusion"
    """magic3d: the mesh of its coarse stage beside that of its fine stage, with the camera given. prolificdreamer: VSD
    beside SDS, several results of a prompt by each: quality, saturation, and diversity against the world's own; half an
    hour on a fast core."""
    model: Annotated[str | None, arg(metavar="MODEL")] = None
    """The prior to measure beside the analytic one; as for generate, by default "toybox"."""
    set: Annotated[tuple[str, ...], arg(metavar="NAME=VALUE ...")] = ()
    """How MODEL is loaded, as for generate: prior.lora, prior.dtype, prior.prediction and so on. What OUT holds already
    is not made again with other ones."""
    camera_only: bool = False
    """Leave out the runs that tell the prior the view in words only."""
    prompts: Annotated[tuple[str, ...], arg(metavar="PROMPT ...")] = ()
    """By default 21."""
    seeds: Annotated[tuple[int, ...], arg(metavar="N ...")] = ()
    """One run for each; by default 0 1 2."""
    steps: Annotated[int | None, arg(metavar="N")] = None
    """By default as for generate; prolificdreamer: 300."""
    particles: Annotated[int | None, arg(metavar="N")] = None
    """prolificdreamer: results of a prompt by each method, in the place of seeds; by default 8."""
    out: Path = Path("runs/evaluation")
    """The folder for meshes, table and JSON; an interrupted evaluation goes on where it stopped."""
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __call__(self) -> int:
        particles = self.pipeline == "prolificdreamer"
        if self.particles is not None and not particles:
            return fail("--particles: only --pipeline prolificdreamer has it")
        if particles and (self.seeds or self.camera_only):
            return fail("--seeds, --camera-only: not with --pipeline prolificdreamer, which takes --particles")
        try:
            settings = model_settings(self.set)
        except ValueError as error:
            return fail(str(error))
        try:
            from text3d_fast.evaluation import suite
        except ImportError:
            return fail("this copy of the package has no evaluation suite")
        return suite.main(self, settings) or 0
