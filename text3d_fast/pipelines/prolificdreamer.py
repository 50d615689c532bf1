"""ProlificDreamer (Wang et al., 2023): 3D scenes as samples of the prior, by variational score distillation.

Stage 1 (section 3): n radiance fields under VSD, w(t) (eps_prior(x_t; y) - eps_score(x_t; y, camera)), and the score of
their noisy pictures learned beside them by a LoRA of the prior. Stage 2 (section 4): each field's surface, its geometry
under SDS on normal maps, texture left out. Stage 3: its texture under VSD, geometry frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from text3d_fast.geometry import Mesh
from text3d_fast.guidance import DistillationLoss
from text3d_fast.pipelines import distributed
from text3d_fast.pipelines.config import ProlificDreamerConfig
from text3d_fast.pipelines.mesh_stage import MeshStage
from text3d_fast.pipelines.particles import ParticleStage, VariationalStage
from text3d_fast.pipelines.pipeline import Pipeline
from text3d_fast.pipelines.recipes import Recipe, particle_recipe, surface_recipe, volume_recipe
from text3d_fast.pipelines.stage import Stage
from text3d_fast.pipelines.volume_stage import VolumeStage, score_distillation
from text3d_fast.scene.cameras import Cameras
from text3d_fast.scene.lights import Lights
from text3d_fast.scene.mesh_renderer import MeshRendering, render_meshes


class Field(VolumeStage):
    """A particle of the first stage."""

    name = "field"


class OfNormals(Stage):
    """A stage whose pictures are normal maps, and whose prompt says so where the prior has a word."""

    @property
    def prompt(self) -> str:
        words = self.prior.normal_words
        return f"{self.run.prompt}, {words}" if words else self.run.prompt


class Shape(OfNormals, MeshStage):
    """A particle of the second stage."""

    name = "shape"

    def render(self, mesh: Mesh, cameras: Cameras, background: Tensor, lights: Lights, mode: str) -> MeshRendering:
        return render_meshes([mesh], cameras, background, mode="normals")


class Paint(MeshStage):
    """A particle of the third stage: its surface is as it was."""

    name = "paint"

    def build(self, previous: Stage | None) -> None:
        super().build(previous)
        self.scene.tets.requires_grad_(False)
        self._surface: Mesh | None = None

    def surface(self) -> Mesh:
        if self._surface is None:
            self._surface = Mesh(*self.scene.tets.mesh()).with_normals()
        return self._surface

    def penalties(self, mesh: Mesh) -> Tensor:
        return torch.zeros((), device=self.device)


class VsdStage(VariationalStage):
    """Radiance fields by VSD."""

    name, particle = "vsd", Field


class GeometryStage(OfNormals, ParticleStage):
    """Surfaces by SDS on normal maps."""

    name, particle = "geometry", Shape

    def distillation(self) -> DistillationLoss:
        return score_distillation(self)


class TextureStage(VariationalStage):
    """Textures by VSD."""

    name, particle = "texturing", Paint


class ProlificDreamer(Pipeline):
    """Text to n textured meshes in three stages; arguments as `Pipeline`. `particles` among the settings is n.

    `run(..., stage="vsd")` runs the first stage alone, `run(..., stage="geometry", start=FOLDER)` the second one from a
    folder that holds a finished first one, and so on.
    """

    config_type = ProlificDreamerConfig
    stages = (VsdStage, GeometryStage, TextureStage)

    def recipes(self) -> dict[str, Recipe]:
        """What suits the prior, by stage."""
        surface = surface_recipe(self.prior)
        return {"vsd": particle_recipe(self.prior, volume_recipe(self.prior)), "geometry": surface,
                "texturing": particle_recipe(self.prior, surface)}

    def check_processes(self, config: ProlificDreamerConfig, stages: Sequence[type[Stage]]) -> None:
        """See Pipeline."""
        super().check_processes(config, stages)
        for kind in stages:
            if distributed.size() > 1 and getattr(config.stage(kind.name), "each_step", "all") == "one":
                raise ValueError(f"{kind.name}.each_step: expected all with {distributed.size()} processes, got one, "
                                 f"with which all but one of them would wait")

    def default_config(self) -> ProlificDreamerConfig:
        settings = {f"{name}.{setting}": value for name, recipe in self.recipes().items()
                    for setting, value in recipe.settings().items()}
        return self.config_type(model=self.model).updated(settings)

    def about(self) -> dict[str, Any]:
        return {"particles": self.config.particles}
