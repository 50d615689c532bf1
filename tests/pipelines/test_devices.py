"""The rooms above the ops on every device there is, against the CPU: pictures, surfaces, textures, steps of pipelines.

Tolerances are those of float32 in another order of summation, a few thousand terms deep: 1e-4 of values around 1.
"""

import math

import pytest
import torch
from red_ball import TINY, RedBall

from text3d_fast import geometry, ops
from text3d_fast.guidance import ScoreDistillation
from text3d_fast.nn import DeformableTetGrid, OccupancyGrid
from text3d_fast.pipelines import DreamFusion, Magic3D
from text3d_fast.scene import Blob, Cameras, RadianceField, VolumeRenderer, headlights
from text3d_fast.scene.mesh_renderer import render_meshes
from text3d_fast.scene.tet_field import ColorField, fit_to_density

CPU = torch.device("cpu")
CLOSE = {"atol": 1e-4, "rtol": 1e-3}


def same(device, make):
    """What `make` gives on the device is what it gives on the CPU: a tensor, or a tuple of them."""
    theirs, ours = make(device), make(CPU)
    theirs, ours = ((x,) if isinstance(x, torch.Tensor) else x for x in (theirs, ours))
    for here, there in zip(ours, theirs, strict=True):
        assert there.device.type == device.type
        torch.testing.assert_close(there.detach().cpu(), here.detach(), **CLOSE)


def field_on(device):
    generator = torch.Generator().manual_seed(0)
    spec = ops.HashGridSpec(levels=3, features=2, log2_table_size=10, base_resolution=3, per_level_scale=1.6,
                            interpolation="smoothstep")
    field = RadianceField(spec, hidden=8, sharpness=20.0, blob=Blob(6.0, 0.5, "linear"), generator=generator)
    with torch.no_grad():
        field.grid.params.uniform_(-0.3, 0.3, generator=generator)
    return field.to(device)


def cameras_on(device, size=17):
    return Cameras.orbit(torch.tensor([0.1, 0.6]), torch.tensor([0.0, 2.0]), 2.5, math.radians(40), size).to(device)


def soft_ball(points):
    return 30 * torch.sigmoid(40 * (0.4 - points.norm(dim=-1)))


@pytest.mark.parametrize("normals", [None, "analytic", "finite"])
def test_field(device, normals):
    points = torch.rand(200, 3, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8

    def make(device):
        sample = field_on(device)(points.to(device), normals)
        return sample.density, sample.albedo, *([] if normals is None else [sample.normals])

    same(device, make)


@pytest.mark.parametrize("mode", ["albedo", "lambertian", "textureless"])
def test_volume_pictures_and_gradients(device, mode):
    def make(device):
        field, cameras = field_on(device), cameras_on(device)
        renderer = VolumeRenderer(OccupancyGrid([-1, -1, -1, 1, 1, 1], 8).to(device), 0.05)
        background = torch.tensor([[0.2, 0.4, 0.6], [1.0, 1.0, 1.0]], device=device)
        out = renderer(field, cameras, background, headlights(cameras), mode)
        (out.color.mean() + out.opacity.mean()).backward()
        return out.color, out.opacity, out.depth, field.grid.params.grad, field.output.weight.grad

    same(device, make)


@pytest.mark.parametrize("mode", ["albedo", "lambertian", "normals"])
def test_mesh_pictures_and_gradients(device, mode):
    def make(device):
        grid = ops.TetGrid.kuhn(12, device=device)
        sdf = 0.5 - grid.positions.norm(dim=-1) + 0.05 * torch.sin(7 * grid.positions).sum(-1)
        vertices, faces = ops.marching_tets(grid.positions, sdf, grid)
        vertices = vertices.detach().requires_grad_()
        mesh = geometry.Mesh(vertices, faces, colors=(vertices.detach() + 1) / 2)
        cameras = cameras_on(device, 24)
        out = render_meshes([mesh], cameras, torch.zeros(2, 3, device=device), headlights(cameras), mode)
        (out.color.square().mean() + out.mask.mean()).backward()
        return out.color, out.mask, out.depth, vertices.grad

    same(device, make)


def test_surface_of_a_volume(device):
    def make(device):
        tets = DeformableTetGrid(16, device=device)
        assert fit_to_density(tets, soft_ball, 15.0)
        color = ColorField.from_radiance_field(field_on(device), 0).to(device)
        vertices, faces = tets.mesh()
        return vertices, faces, color(vertices)

    same(device, make)


def test_exported_meshes(device):
    def make(device):
        mesh, _ = geometry.extract_mesh(soft_ball, 16, 15.0, device=device)
        mesh, report = geometry.clean_mesh(mesh)
        assert report.kept == 1 and mesh.is_watertight()
        mesh = geometry.unwrap(mesh.with_normals(), 64)
        mesh = geometry.bake_texture(mesh, lambda points: (points + 1) / 2, 64)
        mesh = geometry.bake_normals(mesh, geometry.nearest_normals(mesh), 64)
        return mesh.vertices, mesh.faces, mesh.normals, mesh.texture, mesh.normal_map

    same(device, make)


def test_distillation(device):
    from text3d_fast.guidance import Conditions

    def make(device):
        images = torch.rand(2, 12, 12, 3, generator=torch.Generator().manual_seed(2)).to(device).requires_grad_()
        conditions = Conditions(["a ball"] * 2, torch.zeros(2, 3, device=device), torch.ones(2, 3, device=device))
        distill = ScoreDistillation(RedBall(), 0.0, "sample")
        distill(images, conditions, 0.5, torch.Generator().manual_seed(3)).loss.backward()
        return images.grad

    same(device, make)


@pytest.mark.parametrize("pipeline", [DreamFusion, Magic3D])
def test_steps_of_a_pipeline(device, pipeline):
    """The loss of the first steps; later ones drift apart, as roundings grow."""
    stages = ("",) if pipeline is DreamFusion else ("coarse.",)
    settings = {(stage if name.partition(".")[0] not in ("mesh_resolution", "preview_every", "checkpoint_every")
                 else "") + name: value for name, value in TINY.items() for stage in stages}
    if pipeline is Magic3D:
        settings |= {"coarse.steps": 30, "fine.steps": 2, "fine.size": 24, "fine.surface.resolution": 16, "texture": 0,
                     "fine.surface.further_levels": 1, "fine.guidance.weight": 0.0, "fine.guidance.weighting": "sample"}

    def make(device):
        losses = []
        made = pipeline(prior=RedBall(), device=str(device), settings=settings)
        made.run("a ball", callback=lambda step, state: losses.append(state.loss.detach()))
        return torch.stack(losses[:3])

    same(device, make)
