"""Magic3D (Lin et al., 2023): a coarse radiance field, then its surface as a textured mesh at high resolution.

Coarse stage (section 4.1): a hash grid under low-resolution guidance. Fine stage (section 4.2): the field's surface on
a deformable tetrahedral grid, its albedo as texture in space, under guidance at high resolution from longer focal
lengths or of parts of the picture. Editing (section 5): a finished result goes on with another prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from text3d_fast.guidance import Prior, load_prior, registered_priors
from text3d_fast.guidance.registry import DEFAULT_FINE
from text3d_fast.pipelines.config import EditConfig, Magic3DConfig, RunConfig
from text3d_fast.pipelines.mesh_stage import MeshStage
from text3d_fast.pipelines.pipeline import Pipeline
from text3d_fast.pipelines.recipes import Recipe, surface_recipe, volume_recipe
from text3d_fast.pipelines.results import Report, Result
from text3d_fast.pipelines.run_folder import CONFIG, RunFolder
from text3d_fast.pipelines.stage import Stage
from text3d_fast.pipelines.trainer import Callback
from text3d_fast.pipelines.volume_stage import VolumeStage

# Of the steps that a result took, an edit takes at most this share; its colours have far to go in them, so their rates
# are so many times those of the fine stage.
EDIT_SHARE = 0.3
EDIT_COLOR_RATES = 5.0


class CoarseStage(VolumeStage):
    """A radiance field at 64 x 64: Magic3D's differences to DreamFusion are its settings (`config.CoarseConfig`)."""

    name = "coarse"


class FineStage(MeshStage):
    """The coarse field's surface and texture, at high resolution."""

    name = "fine"


class EditStage(MeshStage):
    """The fine stage of a finished result, gone on with another prompt."""

    name = "edit"

    def build(self, previous: Stage | None) -> None:
        super().build(previous)
        self.earlier = {}  # what the result took is told in its own folder


class Magic3D(Pipeline):
    """Text to a textured mesh in two stages; arguments as `Pipeline`, and

    fine_model   the prior of the fine stage, named like `model`. None: `model` itself; if that is not named either, the
                 built-in pair: the learned Toybox prior in the coarse stage, its exact one in the fine stage
    fine_prior   an own `guidance.Prior` for it instead; None with an own `prior`: that one

    `run(..., stage="coarse")` runs the first stage alone, `run(..., stage="fine", start=FOLDER)` the second one from
    a folder that holds a finished first one.
    """

    config_type: type[RunConfig] = Magic3DConfig
    stages = (CoarseStage, FineStage)

    def __init__(
        self,
        model: str | None = None,
        device: str = "auto",
        config: RunConfig | None = None,
        prior: Prior | None = None,
        settings: dict[str, Any] | None = None,
        fine_model: str | None = None,
        fine_prior: Prior | None = None,
    ):
        if fine_model is None and model is None and prior is None:
            fine_model = DEFAULT_FINE
        self.fine_model, self._fine_prior = fine_model or "", fine_prior
        super().__init__(model, device, config, prior, settings)

    @property
    def fine_prior(self) -> Prior:
        """The prior of the fine stage."""
        if self._fine_prior is None:
            built_in = self.fine_model in registered_priors()
            self._fine_prior = self.prior if not self.fine_model else load_prior(
                self.fine_model, self.device, None if built_in else self.options)
        return self._fine_prior

    def stage_prior(self, stage: type[Stage]) -> Prior:
        return self.prior if stage is CoarseStage else self.fine_prior

    def recipes(self) -> dict[str, Recipe]:
        """What suits the priors, by stage."""
        fine = surface_recipe(self.fine_prior)
        return {kind.name: volume_recipe(self.prior) if kind is CoarseStage else fine for kind in self.stages}

    def default_config(self) -> RunConfig:
        settings = {f"{name}.{setting}": value for name, recipe in self.recipes().items()
                    for setting, value in recipe.settings().items()}
        return self.config_type(model=self.model, fine_model=self.fine_model).updated(settings)

    def about(self) -> dict[str, Any]:
        return {"guidance": {kind.name: self.stage_prior(kind).name for kind in self.stages}}


class Edit(Magic3D):
    """Magic3D's prompt-based editing: a finished result goes on with a changed prompt, and what that does not change
    stays.

    folder   of a finished result of Magic3D or of an edit, whose own settings, priors and seed hold
    prior, fine_prior   own ones, if the result was made with own ones
    settings of the stage: {"edit.size": 128}

    Surface and texture start from those of the result; views, sizes and the surface's rates are those of its fine
    stage. Raises OutputError if the folder holds no result of Magic3D.
    """

    config_type = EditConfig
    stages = (CoarseStage, FineStage, EditStage)

    def __init__(
        self,
        folder: str | Path,
        device: str = "auto",
        prior: Prior | None = None,
        fine_prior: Prior | None = None,
        settings: dict[str, Any] | None = None,
    ):
        self.folder = Path(folder)
        for name in settings or {}:
            if name.startswith(("coarse.", "fine.")):
                raise ValueError(f"{name}: that stage is done; settings of an edit begin with edit.")
        saved = self.saved = RunFolder(folder).saved_config(Magic3DConfig, EditConfig)
        self.most_steps = max(1, int(EDIT_SHARE * saved.total_steps([CoarseStage.name, FineStage.name])))
        config = EditConfig.from_yaml(saved.to_yaml(), str(self.folder / CONFIG))
        config.edit = EditConfig.from_yaml(saved.to_yaml()).fine
        rates = config.edit.optimizer
        config = config.updated({
            "pipeline": "edit", "edit.steps": self.most_steps, "edit.optimizer.grid": EDIT_COLOR_RATES * rates.grid,
            "edit.optimizer.network": EDIT_COLOR_RATES * rates.network,
        })
        super().__init__(saved.model if prior is None else None, device, config, prior, settings,
                         saved.fine_model or None, fine_prior)

    def start_config(self, folder: RunFolder, prompt: str) -> RunConfig:
        return self.saved  # whose prompt is meant to be another one

    def _finished(
        self, prompt: str, stages: Sequence[type[Stage]], start: str | Path, out: RunFolder | None = None
    ) -> Stage:
        last = super()._finished(prompt, stages, start, out)
        if isinstance(self.saved, EditConfig):  # an edit of an edit; how many came before does not matter
            last = self._make(self.saved, EditStage, last)
            RunFolder(start).restore_finished(last)
        return last

    def run(
        self,
        prompt: str,
        steps: int | None = None,
        out: str | Path | None = None,
        callback: Callback | None = None,
        resume: bool = False,
        report: Report | None = None,
    ) -> Result:
        """As `Pipeline.run`; steps: at most 30 % of the result's own, which is the default."""
        if steps is not None:
            if not 1 <= steps <= self.most_steps:
                raise ValueError(f"steps: expected 1 to {self.most_steps}, {EDIT_SHARE:.0%} of the result's, "
                                 f"got {steps}")
            self.changes["edit.steps"] = steps
            self.config = self.config.updated(self.changes)
        return super().run(prompt, None, self.config.seed, out, callback, resume, EditStage.name, self.folder, report)

    def about(self) -> dict[str, Any]:
        return {"guidance": {EditStage.name: self.fine_prior.name}, "edited": str(self.folder)}
