import math

import pytest
import torch

from text3d_fast import ops
from text3d_fast.nn import OccupancyGrid
from text3d_fast.scene import (
    Blob,
    Cameras,
    LightDistribution,
    Lights,
    RadianceField,
    ShadingSchedule,
    VolumeRenderer,
    headlights,
    opacity_loss,
    orientation_loss,
    shade,
)
from text3d_fast.scene.background import BackgroundNetwork
from text3d_fast.scene.field import levels_at


def small_field(seed=0, scale=0.3, **options):
    generator = torch.Generator().manual_seed(seed)
    spec = ops.HashGridSpec(levels=3, features=2, log2_table_size=10, base_resolution=3, per_level_scale=1.6,
                            interpolation="smoothstep")
    field = RadianceField(spec, hidden=8, generator=generator, **options)
    with torch.no_grad():
        field.grid.params.uniform_(-scale, scale, generator=generator)
    return field


def points(count, seed=1):
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.8


@pytest.mark.parametrize("density", ["softplus", "exp"])
@pytest.mark.parametrize("profile", ["linear", "gaussian"])
def test_analytic_normals_are_the_gradient_of_the_density(density, profile):
    field = small_field(density=density, blob=Blob(2.0, 0.4, profile))
    x = points(200)
    analytic = field(x, "analytic").normals
    # the density's own central differences, in steps well above fp32 noise
    step, offsets = 2e-3, torch.eye(3)
    slope = torch.stack([field.density_at(x + step * o) - field.density_at(x - step * o) for o in offsets], -1)
    numeric = -torch.nn.functional.normalize(slope, dim=-1)
    close = (analytic * numeric).sum(-1)
    assert close.median() > 0.9999
    assert (close > 0.99).float().mean() > 0.95  # a ReLU's kink may lie between the two points
    assert torch.allclose(analytic.norm(dim=-1), torch.ones(200), atol=1e-5)


def test_finite_normals_agree_with_analytic_ones():
    field, x = small_field(), points(100)
    agreement = (field(x, "finite").normals * field(x, "analytic").normals).sum(-1)
    assert agreement.median() > 0.99


def test_normals_reach_every_parameter_with_the_right_gradient():
    field, x = small_field(), points(50)
    target = torch.nn.functional.normalize(torch.randn(50, 3, generator=torch.Generator().manual_seed(3)), dim=-1)
    (field(x, "analytic").normals * target).sum().backward()
    # along a random direction in parameter space, against the difference quotient
    generator = torch.Generator().manual_seed(4)
    direction = {name: torch.randn(p.shape, generator=generator) for name, p in field.named_parameters()}
    predicted = sum(float((p.grad * direction[name]).sum()) for name, p in field.named_parameters()
                    if p.grad is not None)

    @torch.no_grad()
    def value(step):
        for name, p in field.named_parameters():
            p.add_(step * direction[name])
        out = float((field(x, "analytic").normals.double() * target.double()).sum())
        for name, p in field.named_parameters():
            p.sub_(step * direction[name])
        return out

    step = 2e-4
    measured = (value(step) - value(-step)) / (2 * step)
    assert field.grid.params.grad.abs().max() > 0
    assert predicted == pytest.approx(measured, rel=0.05, abs=0.05)


def test_field_errors_and_empty_input():
    with pytest.raises(ValueError, match="density"):
        small_field(density="relu")
    with pytest.raises(ValueError, match="profile"):
        Blob(profile="square")
    field = small_field()
    with pytest.raises(ValueError, match="normals"):
        field(points(3), "guessed")
    empty = field(torch.zeros(0, 3), "analytic")
    assert empty.density.shape == (0,) and empty.albedo.shape == empty.normals.shape == (0, 3)


def test_levels_grow_with_progress():
    assert [levels_at(p, 8, 4, 0.4) for p in (0, 0.11, 0.39, 0.4, 1.0)] == [4, 5, 7, 8, 8]
    assert levels_at(0.0, 8, 8, 0.4) == 8


def test_shading_formula():
    albedo = torch.tensor([[0.5, 0.25, 1.0], [0.5, 0.25, 1.0]])
    normals = torch.tensor([[0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
    lights = Lights(torch.tensor([[0.0, 2.0, 0.0]]), torch.tensor([[0.8, 0.4, 0.2]]), torch.tensor([[0.1, 0.2, 0.3]]))
    positions = torch.zeros(2, 3)
    lit = shade(albedo, normals, positions, lights, torch.zeros(2, dtype=torch.int32), "lambertian")
    assert torch.allclose(lit[0], albedo[0] * torch.tensor([0.9, 0.6, 0.5]))
    assert torch.allclose(lit[1], albedo[1] * torch.tensor([0.1, 0.2, 0.3]))  # turned away: ambient only
    bare = shade(albedo, normals, positions, lights, torch.zeros(2, dtype=torch.int32), "textureless")
    assert torch.allclose(bare[0], torch.tensor([0.9, 0.6, 0.5]))
    assert shade(albedo, None, positions, lights, None, "albedo") is albedo
    with pytest.raises(ValueError, match="mode"):
        shade(albedo, normals, positions, lights, None, "glossy")


def test_shading_schedule_has_the_papers_shares():
    schedule, generator = ShadingSchedule(), torch.Generator().manual_seed(0)
    assert {schedule.sample(0.01, generator) for _ in range(50)} == {"albedo"}
    modes = [schedule.sample(0.5, generator) for _ in range(4000)]
    shares = [modes.count(name) / 4000 for name in ("albedo", "lambertian", "textureless")]
    assert shares == pytest.approx([0.25, 0.375, 0.375], abs=0.03)  # 4 standard deviations


def test_lights_stand_on_the_cameras_side_in_the_papers_units():
    cameras = Cameras.orbit(0.3, torch.zeros(2000), 1.25, 0.7, 4)
    lights = LightDistribution().sample(cameras, torch.Generator().manual_seed(0))
    distance = lights.position.norm(dim=-1)
    assert distance.min() >= 0.8 and distance.max() <= 1.5
    assert (lights.position * cameras.position).sum(-1).mean() > 0.5
    far = Cameras.orbit(0.3, torch.zeros(2000), 2.5, 0.7, 4)
    twice = LightDistribution().sample(far, torch.Generator().manual_seed(0))
    assert torch.allclose(twice.position, 2 * lights.position, atol=1e-5)
    assert lights.diffuse.unique().tolist() == pytest.approx([0.9])


def ball_renderer(radius=0.5, density=200.0, step=0.02):
    """A renderer and a stand-in field: a hard ball whose albedo is its position."""

    class Ball(torch.nn.Module):
        def forward(self, x, normals=None):
            inside = x.norm(dim=-1) < radius
            unit = None if normals is None else torch.nn.functional.normalize(x, dim=-1)
            return type("Sample", (), {"density": inside * density, "albedo": (x + 1) / 2, "normals": unit})

    return Ball(), VolumeRenderer(OccupancyGrid([-1, -1, -1, 1, 1, 1], 8), step)


def test_renderer_sees_a_ball_where_it_is():
    field, renderer = ball_renderer()
    cameras = Cameras.orbit(torch.tensor([0.0, 0.5]), torch.tensor([0.0, 2.0]), 2.5, math.radians(40), 33)
    background = torch.tensor([[0.2, 0.4, 0.6], [1.0, 1.0, 1.0]])
    out = renderer(field, cameras, background, headlights(cameras), "lambertian")
    assert torch.allclose(out.color[:, 0, 0], background, atol=1e-5)  # corners miss
    assert out.opacity[:, 16, 16].min() > 0.99
    assert torch.allclose(out.depth[:, 16, 16], torch.full((2,), 2.0), atol=0.03)
    # half angle asin(0.5 / 2.5), so tan / tan(20 degrees) of the picture's half height
    expected = math.pi * (math.tan(math.asin(0.2)) / math.tan(math.radians(20)) / 2) ** 2
    assert out.opacity.mean().item() == pytest.approx(expected, rel=0.05)
    assert out.orientation < 1e-3  # a ball's normals face the camera that sees them


def test_orientation_penalizes_normals_that_face_away_and_stops_at_the_weights():
    weights = torch.tensor([0.5, 0.5], requires_grad=True)
    normals = torch.tensor([[0.0, 0.0, -1.0], [0.0, 0.0, 1.0]], requires_grad=True)
    directions = torch.tensor([[0.0, 0.0, -1.0]] * 2)
    loss = orientation_loss(weights, normals, directions, 1)
    assert loss.item() == pytest.approx(0.5)
    loss.backward()
    assert weights.grad is None and normals.grad.abs().sum() > 0
    assert opacity_loss(torch.zeros(7)).item() == pytest.approx(0.1)


def test_pruned_space_has_no_density():
    field, renderer = small_field(), VolumeRenderer(OccupancyGrid([-1, -1, -1, 1, 1, 1], 4), 0.05, radius=0.9)
    renderer.occupancy.binaries.fill_(False)
    renderer.occupancy.binaries[0, 2, 2, 2] = True
    density = renderer.visible_density(field)
    assert density(torch.tensor([[0.2, 0.2, 0.2]])) > 0
    assert density(torch.tensor([[-0.2, 0.2, 0.2], [1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]])).abs().sum() == 0


def test_background_network_is_smooth_and_bounded():
    network = BackgroundNetwork(generator=torch.Generator().manual_seed(0))
    directions = torch.nn.functional.normalize(torch.randn(2, 3, 4, 3), dim=-1)
    color = network(directions)
    assert color.shape == (2, 3, 4, 3) and 0 < color.min() and color.max() < 1


def test_mesh_renderer_agrees_with_the_volume_renderer():
    import trimesh

    from text3d_fast.geometry import Mesh
    from text3d_fast.scene.mesh_renderer import render_meshes

    ball = trimesh.creation.icosphere(subdivisions=4, radius=0.5)
    vertices = torch.tensor(ball.vertices, dtype=torch.float32)
    mesh = Mesh(vertices, torch.tensor(ball.faces, dtype=torch.int32), 2 * vertices, (vertices + 1) / 2)
    cameras = Cameras.orbit(torch.tensor([0.0, 0.5]), torch.tensor([0.0, 2.0]), 2.5, math.radians(40), 32)
    background, lights = torch.tensor([[0.2, 0.4, 0.6]]).expand(2, 3), headlights(cameras)
    surface = render_meshes([mesh], cameras, background, lights)
    field, renderer = ball_renderer(density=2000.0, step=0.005)
    volume = renderer(field, cameras, background, lights, "lambertian")
    inside = -torch.nn.functional.max_pool2d(-surface.mask[:, None], 3, 1, 1)[:, 0] > 0.999
    assert inside.float().mean() > 0.12
    assert (surface.color - volume.color)[inside].abs().max() < 0.03  # samples are up to 0.005 deep
    assert (surface.mask - volume.opacity).abs().mean() < 0.02
