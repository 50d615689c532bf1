"""The stage that fine detail comes from: a surface and its texture whose pictures please an image prior."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from text3d_fast import geometry
from text3d_fast.errors import EmptyMesh
from text3d_fast.geometry import Mesh
from text3d_fast.guidance import DistillationLoss
from text3d_fast.nn import DeformableTetGrid
from text3d_fast.pipelines.pictures import mesh_views
from text3d_fast.pipelines.stage import Extraction, Look, Stage, StepState
from text3d_fast.pipelines.stage_config import MeshConfig
from text3d_fast.pipelines.surface import asset, choose_threshold
from text3d_fast.pipelines.volume_stage import (
    VolumeStage,
    distillation_step,
    sample_cameras,
    score_distillation,
    view_prompts,
)
from text3d_fast.scene.background import random_background
from text3d_fast.scene.cameras import Cameras
from text3d_fast.scene.lights import Lights, headlights
from text3d_fast.scene.mesh_renderer import MeshRendering, render_meshes
from text3d_fast.scene.regularizers import laplacian_loss, normal_consistency, sdf_sign_loss
from text3d_fast.scene.tet_field import ColorField, TetField, fit_to_density

KEEP_EVERY = 20  # steps between copies of a surface to step back to
GONE = 0.05  # a surface has vanished when so few of the copy's faces are left


class MeshStage(Stage):
    """Distances and offsets of a deformable tetrahedral grid and a colour field, seen through marching tetrahedra, the
    rasterizer and antialiasing, moved by score distillation.

    Begins with the surface of a `VolumeStage`, or goes on with that of a `MeshStage`. A surface that vanishes on the
    way is set back to the last copy of it, with half the rates from there on, and the result says so.
    """

    config: MeshConfig

    def build(self, previous: Stage | None) -> None:
        if isinstance(previous, MeshStage):
            self.scene = copy.deepcopy(previous.scene)
        elif isinstance(previous, VolumeStage):
            self.scene = surface_of_volume(previous, self.config, self.generator)
        else:
            raise ValueError(f"previous: expected a finished stage with a volume or a surface, got {previous!r}")
        tets, color, rates = self.scene.tets, self.scene.color, self.config.optimizer
        self.kept = Kept(tets)
        groups = [
            ([tets.sdf], rates.sdf * float(tets.spacing)), ([tets.deformation], rates.deformation),
            (list(color.grid.parameters()), rates.grid),
            ([*color.hidden.parameters(), *color.output.parameters()], rates.network),
        ]
        self._rates = [rate for _, rate in groups]
        self.optimizer = torch.optim.Adam([{"params": parameters} for parameters, _ in groups],
                                          lr=0.0, betas=(0.9, 0.99), eps=1e-15, fused=True)
        self.views = view_prompts(self.config, self.prompt)
        self.distill = self.distillation()
        self.prior.prepare(self.distill.texts(self.views.all(self.prompt)))

    def modules(self) -> dict[str, nn.Module]:
        return {"scene": self.scene, "kept": self.kept}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"optimizer": self.optimizer}

    def step(self) -> StepState:
        """Magic3D's section 4.2: the mesh of now, a picture of it or of a part, score distillation, Adam."""
        return distillation_step(self)

    def look(self, cameras: Cameras | None = None, color: Tensor | None = None) -> Look:
        """The step's pictures: from these cameras, over this colour [B, 3]; None: random ones, as the light is."""
        config, generator = self.config, self.generator
        mesh = self.surface()
        scale = float(self.kept.scale)
        for group, rate, part in zip(self.optimizer.param_groups, self._rates, (scale, scale, 1.0, 1.0), strict=True):
            group["lr"] = part * config.optimizer.rate(rate, self.step_done, config.steps)
        if cameras is None:
            cameras = self.sample_cameras()
        lights = config.lights.sample(cameras, generator)
        mode = config.shading.sample(self.progress, generator)
        if color is None:
            color = random_background(config.batch, generator, self.device)
        here = self.rows.here
        cameras, lights, color = cameras[here], lights[here], color[here]
        rendering = self.render(mesh, cameras, color, lights, mode)
        return Look(rendering, self.images(rendering), cameras, color, self.penalties(mesh))

    def surface(self) -> Mesh:
        """The mesh of now, with smooth normals; if it has vanished, that of the last copy."""
        vertices, faces = self.scene.tets.mesh()
        if len(faces) <= GONE * int(self.kept.faces):
            self.kept.step_back(self.scene.tets, self.step_done)
            for parameter in (self.scene.tets.sdf, self.scene.tets.deformation):
                self.optimizer.state.pop(parameter, None)  # what drove it there
            vertices, faces = self.scene.tets.mesh()
        elif self.step_done % KEEP_EVERY == 0:
            self.kept.keep(self.scene.tets, len(faces))
        return Mesh(vertices, faces, geometry.vertex_normals(vertices, faces, "area"))

    def render(self, mesh: Mesh, cameras: Cameras, background: Tensor, lights: Lights, mode: str) -> MeshRendering:
        return render_meshes([mesh], cameras, background, lights, mode, material=self.scene.color)

    def sample_cameras(self) -> Cameras:
        return sample_cameras(self)

    def distillation(self) -> DistillationLoss:
        return score_distillation(self)

    def images(self, rendering: MeshRendering) -> Tensor:
        """The step's pictures; larger ones are averaged down to the prior's size."""
        factor, rest = divmod(rendering.color.shape[1], self.prior.image_size)
        images = rendering.color
        if factor > 1 and rest == 0:
            images = nn.functional.avg_pool2d(images.permute(0, 3, 1, 2), factor).permute(0, 2, 3, 1)
        return images

    def penalties(self, mesh: Mesh) -> Tensor:
        tets = self.scene.tets
        terms = {
            "normals": lambda: normal_consistency(mesh.normals, mesh.faces),
            "laplacian": lambda: laplacian_loss(mesh.vertices, mesh.faces, tets.spacing),
            "sign": lambda: sdf_sign_loss(tets.sdf / tets.spacing, tets.crossing_edges()),
        }
        total = torch.zeros((), device=self.device)
        for name, term in terms.items():
            start, end = getattr(self.config.penalties, name)
            weight = start + (end - start) * self.progress
            if weight > 0:
                total = total + weight * term()
        return total

    @torch.no_grad()
    def picture(self, cameras: Cameras) -> Tensor:
        background = torch.ones(len(cameras), 3, device=self.device)
        mesh = Mesh(*self.scene.tets.mesh())
        if not len(mesh.faces):
            return background[:, None, None].expand(-1, cameras.height, cameras.width, 3)
        lights, mesh = headlights(cameras), mesh.with_normals()
        rendering = render_meshes([mesh], cameras, background, lights, material=self.scene.color)
        return rendering.color.clamp(0, 1)

    @torch.no_grad()
    def preview(self) -> Tensor:
        """Four sides of the mesh side by side."""
        vertices, faces = self.scene.tets.mesh()
        mesh = Mesh(vertices, faces, colors=self.scene.color(vertices))
        return torch.cat(list(mesh_views(mesh, self.config.cameras, [0.0, 90.0, 180.0, 270.0], size=128)), 1)

    @torch.no_grad()
    def extract(self) -> list[Extraction]:
        mesh, report = geometry.clean_mesh(Mesh(*self.scene.tets.mesh()))
        if len(mesh.faces):
            mesh = asset(mesh, self.scene.color, self.run.faces, self.run.texture)
        figures = {"vertices": len(mesh.vertices), "faces": len(mesh.faces), "components": report.kept,
                   "floaters_removed": sum(piece.reason != "cavity" for piece in report.dropped),
                   "cavities_removed": sum(piece.reason == "cavity" for piece in report.dropped),
                   "steps_back": int(self.kept.count)}
        warnings = []
        if self.kept.count:
            warnings.append(f"the surface vanished {int(self.kept.count)} times, last at step {int(self.kept.last)}; "
                            f"each time the last copy of it was taken and went on at half the rate")
        if len(mesh.faces):
            low, high = mesh.vertices.amin(0), mesh.vertices.amax(0)
            figures["size"] = [round(value, 3) for value in (high - low).tolist()]
        return [Extraction(mesh, figures, warnings)]


class Kept(nn.Module):
    """A copy of a surface to step back to, and what happened so far; saved with the stage.

    faces  of the copy; count  times that it was needed, last  the step; scale  of the geometry's rates from then on
    """

    def __init__(self, tets: DeformableTetGrid):
        super().__init__()
        for name in ("sdf", "deformation"):
            self.register_buffer(name, getattr(tets, name).detach().clone())
        for name in ("faces", "count", "last"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.ones(()))
        self.faces.fill_(len(tets.mesh()[1]))

    @torch.no_grad()
    def keep(self, tets: DeformableTetGrid, faces: int) -> None:
        self.sdf.copy_(tets.sdf)
        self.deformation.copy_(tets.deformation)
        self.faces.fill_(faces)

    @torch.no_grad()
    def step_back(self, tets: DeformableTetGrid, step: int) -> None:
        tets.sdf.copy_(self.sdf)
        tets.deformation.copy_(self.deformation)
        self.count += 1
        self.last.fill_(step)
        self.scale *= 0.5


@torch.no_grad()
def surface_of_volume(stage: VolumeStage, config: MeshConfig, generator: torch.Generator) -> TetField:
    """The volume's surface at the level that its silhouettes choose, as for its own mesh, without floaters and hidden
    cavities, and its albedo as texture. EmptyMesh if there is none.
    """
    chosen, device = config.surface, stage.device
    density = geometry.averaged_density(stage.renderer.visible_density(stage.field), stage.renderer.step,
                                        resolution=stage.run.mesh_resolution, device=device)
    level, _ = choose_threshold(stage.renderer, stage.field, stage.config.cameras, density)
    if level == "auto":
        _, level = geometry.extract_mesh(density, 64, device=device)
    tets = DeformableTetGrid(chosen.resolution, chosen.lattice, device=device)
    if not level or not fit_to_density(tets, density, level):
        raise EmptyMesh("the coarse stage left nothing dense enough to have a surface; try more steps or another seed")
    remove_loose_parts(tets)
    color = ColorField.from_radiance_field(stage.field, chosen.further_levels, generator)
    return TetField(tets, color.to(device))


@torch.no_grad()
def remove_loose_parts(tets: DeformableTetGrid, smallest: float = 0.05, rounds: int = 50) -> None:
    """Turn the vertices of floaters outside and those of hidden cavities inside, layer by layer from their surface.

    smallest: parts with less area than this share of the largest one's are floaters, as in `geometry.clean_mesh`.
    """
    for _ in range(rounds):
        mesh = Mesh(*tets.mesh())
        if not len(mesh.faces):
            return
        part = mesh.components()
        count = int(part.max()) + 1
        area = torch.zeros(count, device=part.device).index_add_(0, part, mesh.area_vectors().norm(dim=-1))
        a, b, c = mesh.corners().unbind(1)
        volume = torch.zeros(count, device=part.device).index_add_(0, part, (torch.linalg.cross(a, b) * c).sum(-1))
        loose, hollow = area < smallest * area.max(), volume < 0
        if not (loose | hollow).any():
            return
        of_vertex = torch.zeros(len(mesh.vertices), dtype=torch.int64, device=part.device)
        of_vertex[mesh.faces.long().flatten()] = part.repeat_interleave(3)
        ends = tets.crossing_edges().long()
        low_inside = tets.sdf[ends[:, 0]] > 0
        inner = torch.where(low_inside, ends[:, 0], ends[:, 1])
        outer = torch.where(low_inside, ends[:, 1], ends[:, 0])
        tets.sdf[inner[(loose & ~hollow)[of_vertex]]] = -0.5 * tets.spacing
        tets.sdf[outer[hollow[of_vertex]]] = 0.5 * tets.spacing
