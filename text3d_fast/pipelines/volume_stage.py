"""The stage that most of text to 3D starts with: a radiance field whose pictures please an image prior."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from text3d_fast import ops
from text3d_fast.guidance import DISTILLATIONS, Conditions, DistillationLoss, TimeRange
from text3d_fast.guidance.debias import MaskedViews, debias
from text3d_fast.guidance.prompts import ViewPrompts
from text3d_fast.nn import OccupancyGrid
from text3d_fast.pipelines.pictures import volume_views
from text3d_fast.pipelines.stage import Extraction, Look, Stage, StepState
from text3d_fast.pipelines.stage_config import FieldConfig, GuidanceConfig, MeshConfig, VolumeConfig
from text3d_fast.pipelines.surface import volume_surface
from text3d_fast.scene.background import BackgroundNetwork, random_background
from text3d_fast.scene.cameras import Cameras
from text3d_fast.scene.field import Blob, RadianceField, levels_at
from text3d_fast.scene.lights import headlights
from text3d_fast.scene.regularizers import entropy_loss, opacity_loss, thickness_loss
from text3d_fast.scene.volume_renderer import Rendering, VolumeRenderer

if TYPE_CHECKING:
    from text3d_fast.pipelines.mesh_stage import MeshStage
    from text3d_fast.pipelines.particles import ParticleStage


class VolumeStage(Stage):
    """A field, its background and its occupancy grid, rendered from random cameras and moved by score distillation.

    Further pipelines change one of its parts: `sample_cameras`, `distillation`, `penalties`.
    """

    config: VolumeConfig

    def build(self, previous: Stage | None) -> None:
        config = self.config
        self.field = make_field(config.field, self.generator).to(self.device)
        self.background: BackgroundNetwork | None = None
        if config.background == "network":
            self.background = BackgroundNetwork(generator=self.generator).to(self.device)
        occupancy = OccupancyGrid([-1, -1, -1, 1, 1, 1], config.sampling.occupancy).to(self.device)
        self.renderer = VolumeRenderer(occupancy, config.sampling.step, config.sampling.radius)
        rates = config.optimizer
        groups: list[tuple[nn.Module, float]] = [
            (self.field.grid, rates.grid), (self.field.hidden, rates.network), (self.field.output, rates.network)
        ]
        if self.background is not None:
            groups.append((self.background, rates.background))
        self._rates = [rate for _, rate in groups]
        self.optimizer = torch.optim.Adam([{"params": list(module.parameters())} for module, _ in groups],
                                          lr=0.0, betas=(0.9, 0.99), eps=1e-15, fused=True)
        self.views = view_prompts(config, self.prompt)
        self.distill = self.distillation()
        self.prior.prepare(self.distill.texts(self.views.all(self.prompt)))

    def modules(self) -> dict[str, nn.Module]:
        named = {"field": self.field, "occupancy": self.renderer.occupancy}
        return named if self.background is None else named | {"background": self.background}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"optimizer": self.optimizer}

    def step(self) -> StepState:
        """One step of DreamFusion's section 3."""
        return distillation_step(self)

    def look(self, cameras: Cameras | None = None, color: Tensor | None = None) -> Look:
        """The step's pictures: from these cameras, over this colour [B, 3]; None: random ones, as the light is."""
        config, generator = self.config, self.generator
        self._prepare_step()
        if cameras is None:
            cameras = self.sample_cameras()
        lights = config.lights.sample(cameras, generator)
        mode = config.shading.sample(self.progress, generator)
        if color is None:
            color = random_background(config.batch, generator, self.device)
        jitter = torch.rand(config.batch, config.size, config.size, generator=generator)
        here = self.rows.here
        cameras, lights, color, jitter = (part[here] for part in (cameras, lights, color, jitter))
        background = color if self.background is None else self.background(cameras.rays()[1])
        normals = config.field.normals if self.penalty("orientation") > 0 or mode != "albedo" else None
        rendering = self.renderer(self.field, cameras, background, lights, mode, normals, jitter)
        return Look(rendering, rendering.color, cameras, color if self.background is None else None,
                    self.penalties(rendering))

    def _prepare_step(self) -> None:
        """What depends on the step alone: learning rates, hash-grid levels, the occupancy grid."""
        config, progress = self.config, self.progress
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = config.optimizer.rate(rate, self.step_done, config.steps)
        chosen, sampling = config.field, config.sampling
        self.field.active_levels = levels_at(progress, chosen.levels, chosen.start_levels, chosen.levels_end)
        # on the occupancy grid's device; a function of seed and step, so it need not be saved
        drawn = torch.Generator(self.device).manual_seed(hash((self.run.seed, self.step_done)) & (2**63 - 1))
        self.renderer.update(self.field, self.step_done, drawn, progress < sampling.prune_from,
                             every=sampling.update_every, warmup=0, threshold=sampling.threshold)

    def sample_cameras(self) -> Cameras:
        return sample_cameras(self)

    def distillation(self) -> DistillationLoss:
        return score_distillation(self)

    def penalty(self, name: str) -> float:
        """The weight of a penalty now."""
        start, end = getattr(self.config.penalties, name)
        return start + (end - start) * self.progress

    def penalties(self, rendering: Rendering) -> Tensor:
        terms = {
            "orientation": lambda: rendering.orientation,
            "opacity": lambda: opacity_loss(rendering.opacity),
            "entropy": lambda: entropy_loss(rendering.opacity),
            "thickness": lambda: thickness_loss(rendering.depth_variance, rendering.opacity),
        }
        total = torch.zeros((), device=self.device)
        for name, term in terms.items():
            weight = self.penalty(name)
            if weight > 0:
                total = total + weight * term()
        return total

    @torch.no_grad()
    def picture(self, cameras: Cameras) -> Tensor:
        background = torch.ones(len(cameras), 3, device=self.device)
        rendering = self.renderer(self.field, cameras, background, headlights(cameras), "lambertian",
                                  self.config.field.normals)
        return rendering.color.clamp(0, 1)

    def preview(self) -> Tensor:
        """Four sides of the volume side by side."""
        pictures, _ = volume_views(self.renderer, self.field, self.config.cameras, [0.0, 90.0, 180.0, 270.0], size=96,
                                   normals=self.config.field.normals)
        return torch.cat(list(pictures), 1)

    def extract(self) -> list[Extraction]:
        run = self.run
        return [volume_surface(self.renderer, self.field, self.config.cameras, run.mesh_resolution, run.texture,
                               run.faces)]


def make_field(config: FieldConfig, generator: torch.Generator) -> RadianceField:
    """A fresh field in [-1, 1]^3."""
    spec = ops.HashGridSpec.with_max_resolution(
        config.max_resolution, levels=config.levels, features=config.features,
        log2_table_size=config.log2_table_size, base_resolution=config.base_resolution,
        interpolation="smoothstep" if config.smooth else "linear",
    )
    blob = Blob(config.blob_scale, config.blob_width, config.blob_profile)
    return RadianceField(spec, config.hidden, radius=1.0, density=config.density, sharpness=config.sharpness,
                         blob=blob, generator=generator)


def sample_cameras(stage: Stage) -> Cameras:
    """Random ones; for a multi-view prior groups round the object; or some of those that the prior knows exactly, if it
    is told the camera at all.
    """
    config = stage.config
    known = stage.prior.known_cameras(stage.run.prompt) if config.guidance.camera else None
    if stage.prior.views > 1:
        cameras = config.cameras.around(config.batch, stage.prior.views, config.size, stage.generator)
    elif known is None:
        cameras = config.cameras.sample(config.batch, config.size, stage.generator)
    else:
        cameras = config.cameras.choose(known, config.batch, config.size, stage.generator)
    return cameras.to(stage.device)


def score_distillation(stage: VolumeStage | MeshStage | ParticleStage) -> DistillationLoss:
    """Of the stage's guidance settings."""
    chosen: GuidanceConfig = stage.config.guidance
    options = guidance_options(chosen, stage.views, stage.prompt)
    if chosen.distillation == "sds":
        options["jacobian"] = chosen.jacobian
    return DISTILLATIONS[chosen.distillation](
        stage.prior, chosen.weight, chosen.weighting, time_range(chosen), **options
    )


def view_prompts(config: VolumeConfig | MeshConfig, prompt: str) -> ViewPrompts:
    """Of the stage's settings."""
    front, back = config.view_sectors
    chosen = config.guidance.debias
    texts = {} if chosen is None else debias(prompt, MaskedViews(chosen))
    return ViewPrompts(config.view_words, front=front, back=back, texts=texts)


def guidance_options(chosen: GuidanceConfig, views: ViewPrompts, prompt: str) -> dict[str, Any]:
    """Those that every `DistillationLoss` has."""
    return {"clip": chosen.clip, "negative_prompt": chosen.negative_prompt,
            "perp_neg": views.negatives(prompt, chosen.perp_neg)}


def time_range(chosen: GuidanceConfig) -> TimeRange:
    final = chosen.final_time or (None, None)
    kind = "constant" if chosen.final_time is None else chosen.time_moves
    return TimeRange(*chosen.time, *final, kind=kind, end=chosen.time_end)


def distillation_step(stage: Stage) -> StepState:
    """A picture (`stage.look`), its distillation (`stage.distill`) and a step of `stage.optimizer`."""
    # 1. a picture from a random camera
    look = stage.look()

    # 2. score distillation, with the prompt of the view; the noise too is drawn on the CPU: it costs nothing, and a
    # seed means the same everywhere
    distilled = stage.distill(look.images, view_conditions(stage, look), stage.progress, [stage.rows])
    loss = distilled.loss + look.penalties

    # 3. a step of Adam
    stage.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    stage.share.average(stage.optimizer)
    stage.optimizer.step()
    return StepState(stage, look.rendering, loss.detach(), distilled.gradient_norm)


def view_conditions(stage: Stage, look: Look) -> Conditions:
    """What the prior is told of a look: the prompt of the view, and of the rest what it knows and may know."""
    cameras, background = look.cameras, look.background
    chosen: GuidanceConfig = stage.config.guidance
    known = stage.prior.conditions
    return Conditions(
        stage.views(stage.prompt, cameras.elevation, cameras.azimuth),
        cameras.condition if chosen.camera and "camera" in known else None,
        background if chosen.background and "background" in known else None,
        cameras.camera_to_world if chosen.camera and "pose" in known else None,
        window=cameras.window if "window" in known else None,
    )
