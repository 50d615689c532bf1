"""From a radiance field to a surface with a volumetric texture; what smooths the surface; pictures of parts."""

import math

import pytest
import torch

from text3d_fast import ops
from text3d_fast.geometry import Mesh, vertex_normals
from text3d_fast.nn import DeformableTetGrid
from text3d_fast.scene import RadianceField, laplacian_loss, normal_consistency, sdf_sign_loss
from text3d_fast.scene.cameras import CameraDistribution, Cameras
from text3d_fast.scene.mesh_renderer import render_meshes
from text3d_fast.scene.tet_field import MARGIN, ColorField, fit_to_density


def soft_ball(centre=(0.1, -0.1, 0.0), radius=0.4, sharpness=40.0):
    centre = torch.tensor(centre)
    return lambda points: 30 * torch.sigmoid(sharpness * (radius - (points - centre).norm(dim=-1)))


def surface(grid):
    return Mesh(*(x.detach() for x in grid.mesh()))


def test_density_becomes_the_distance_to_its_level_in_the_objects_own_box():
    grid = DeformableTetGrid(48)
    assert fit_to_density(grid, soft_ball(), 15.0)  # half of the most: exactly at the radius
    assert float(grid.half_side) == pytest.approx(0.4 * MARGIN, rel=0.03)
    torch.testing.assert_close(grid.centre, torch.tensor([0.1, -0.1, 0.0]), atol=0.01, rtol=0)
    radii = (surface(grid).vertices - torch.tensor([0.1, -0.1, 0.0])).norm(dim=-1)
    assert (radii - 0.4).abs().max() < 0.15 * grid.spacing  # log density is not linear over an edge
    # a distance, near the surface: a unit step in space is a unit step in value (log sigmoid bends within 1 / 40)
    true = 0.4 - (grid.rest_positions() - torch.tensor([0.1, -0.1, 0.0])).norm(dim=-1)
    near = true.abs() < 0.5 * grid.spacing
    assert (grid.sdf[near] - true[near]).abs().max() < 0.25 * grid.spacing
    assert (grid.sdf.sign() == true.sign())[true.abs() > 0.2 * grid.spacing].all()


def test_nothing_dense_enough_gives_no_surface():
    grid = DeformableTetGrid(16)
    assert not fit_to_density(grid, lambda points: torch.zeros(len(points)), 1.0)
    assert not len(grid.mesh()[1])


def radiance_field(levels=4):
    spec = ops.HashGridSpec.with_max_resolution(32, levels=levels, log2_table_size=10, base_resolution=4)
    field = RadianceField(spec, hidden=8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.no_grad():
        field.grid.params.normal_()
    return field


@pytest.mark.parametrize(("further", "active"), [(0, None), (2, None), (2, 3)])
def test_the_colour_field_starts_as_the_radiance_fields_albedo(further, active):
    field = radiance_field()
    field.active_levels = active
    color = ColorField.from_radiance_field(field, further)
    points = torch.rand(200, 3) * 2.2 - 1.1
    torch.testing.assert_close(color(points), field(points).albedo, atol=1e-6, rtol=1e-5)
    if further:  # and can learn finer than it
        color(points).square().sum().backward()
        assert color.grid.params.grad[field.grid.spec.num_params:].abs().sum() > 0


def icosahedron():
    g = (1 + 5**0.5) / 2
    v = [(0, s, t * g) for s in (-1, 1) for t in (-1, 1)]
    v = torch.tensor(v + [(b, c, a) for a, b, c in v] + [(c, a, b) for a, b, c in v]).float()
    v = v / v.norm(dim=1, keepdim=True)
    near = torch.cdist(v, v)
    side = near[near > 1e-3].min() * 1.01
    faces = [(i, j, k) for i in range(12) for j in range(i + 1, 12) for k in range(j + 1, 12)
             if max(near[i, j], near[j, k], near[i, k]) < side]
    return v, torch.tensor(faces, dtype=torch.int32)


def test_regularizers_against_their_sums_edge_by_edge():
    torch.manual_seed(0)
    vertices, faces = icosahedron()
    vertices = (vertices + 0.1 * torch.randn(12, 3)).double()
    edges, _ = Mesh(vertices, faces).edges()
    normals = torch.nn.functional.normalize(torch.randn(12, 3).double(), dim=-1)
    expected = (1 - (normals[edges[:, 0]] * normals[edges[:, 1]]).sum(-1)).mean()
    torch.testing.assert_close(normal_consistency(normals, faces), expected)
    around = torch.zeros(12, 12, dtype=torch.float64)
    around[edges[:, 0], edges[:, 1]] = around[edges[:, 1], edges[:, 0]] = 1
    laplacian = around @ vertices / around.sum(1, keepdim=True) - vertices
    expected = (laplacian / 0.5).square().sum(-1).mean()
    torch.testing.assert_close(laplacian_loss(vertices, faces, 0.5), expected)
    s = torch.tensor([0.3, -2.0, 1.0])
    pairs = torch.tensor([[0, 1], [1, 2]])
    by_hand = [math.log(1 + math.exp(v)) for v in (0.3, 2.0, 2.0, 1.0)]  # every end wants the other's sign
    assert float(sdf_sign_loss(s, pairs)) == pytest.approx(sum(by_hand) / 2, rel=1e-6)


def test_regularizers_have_gradients_and_take_nothing():
    vertices, faces = icosahedron()
    vertices = vertices.double().requires_grad_()

    def penalties(v):
        return normal_consistency(vertex_normals(v, faces, "area"), faces) + laplacian_loss(v, faces)

    assert torch.autograd.gradcheck(penalties, (vertices,))
    s = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sdf_sign_loss(x, torch.tensor([[0, 1], [2, 3], [1, 5]])), (s,))
    none = torch.zeros(0, 3, requires_grad=True)
    nothing = torch.zeros(0, 3, dtype=torch.int32)
    total = normal_consistency(none, nothing) + laplacian_loss(none, nothing)
    total = total + sdf_sign_loss(s.float(), torch.zeros(0, 2, dtype=torch.int32))
    total.backward()
    assert total == 0


def test_a_window_shows_that_part_of_the_picture():
    vertices, faces = icosahedron()
    mesh = Mesh(0.5 * vertices, faces, colors=(vertices + 1) / 2)
    whole = Cameras.orbit(0.3, 0.5, 2.0, 0.8, (128, 192))
    corner = whole.zoomed(torch.tensor([[0.25, -0.25, 0.5]])).resized(64, 96)
    background = torch.tensor([[0.2, 0.4, 0.6]])
    large = render_meshes([mesh], whole, background, mode="albedo")
    part = render_meshes([mesh], corner, background, mode="albedo")
    # x from -0.25 to 0.75 of -1..1: columns 72 to 168; y from -0.75 to 0.25: rows 48 to 112
    torch.testing.assert_close(part.color, large.color[:, 48:112, 72:168], atol=2e-3, rtol=0)  # clip-space rounding
    torch.testing.assert_close(corner.rays()[1], whole.rays()[1][:, 48:112, 72:168], atol=1e-6, rtol=0)
    twice = whole.zoomed(torch.tensor([[0.5, 0.5, 0.5]])).zoomed(torch.tensor([[-1.0, 0.0, 0.5]]))
    torch.testing.assert_close(twice.window, torch.tensor([[0.0, 0.5, 0.25]]))
    longer = Cameras.orbit(0.3, 0.5, 2.0, 2 * math.atan(math.tan(0.4) / 2), 64)
    centred = Cameras.orbit(0.3, 0.5, 2.0, 0.8, 64).zoomed(torch.tensor([[0.0, 0.0, 0.5]]))
    torch.testing.assert_close(centred.rays()[1], longer.rays()[1], atol=1e-6, rtol=0)


def test_zoomed_cameras_stay_inside_the_picture_and_plain_ones_draw_as_before():
    plain, zoom = CameraDistribution(), CameraDistribution(zoom=(1.0, 4.0))
    first = plain.sample(5, 8, torch.Generator().manual_seed(3))
    second = zoom.sample(5, 8, torch.Generator().manual_seed(3))
    assert first.window is None
    torch.testing.assert_close(first.camera_to_world, second.camera_to_world)
    x, y, size = zoom.sample(500, 8, torch.Generator().manual_seed(0)).window.unbind(-1)
    assert (torch.maximum(x.abs(), y.abs()) + size <= 1 + 1e-6).all()
    assert size.min() < 0.27 and size.max() > 0.9
    with pytest.raises(ValueError, match="zoom: expected at least 1"):
        CameraDistribution(zoom=(0.5, 1.0))


def test_only_visible_pixels_ask_the_material_and_nothing_is_a_picture_too():
    vertices, faces = icosahedron()
    cameras, background = Cameras.orbit(0.3, 0.5, 2.0, 0.8, 48), torch.tensor([[0.2, 0.4, 0.6]])
    asked = []

    def material(points):
        asked.append(len(points))
        return torch.ones_like(points)

    out = render_meshes([Mesh(0.5 * vertices, faces)], cameras, background, mode="albedo", material=material)
    seen = out.depth > 0
    assert asked == [int(seen.sum())]
    empty = torch.zeros(0, 3, requires_grad=True)
    nothing = Mesh(empty, torch.zeros(0, 3, dtype=torch.int32))
    out = render_meshes([nothing], cameras, background, mode="albedo", material=material)
    torch.testing.assert_close(out.color, background.expand_as(out.color))
    (out.color.sum() + out.mask.sum()).backward()


def test_normals_as_a_picture():
    vertices, faces = icosahedron()
    cameras = Cameras.orbit(0.3, 0.5, 2.0, 0.8, 48)
    out = render_meshes([Mesh(0.5 * vertices, faces)], cameras, torch.full((1, 3), 0.5), mode="normals")
    inside = torch.nn.functional.max_pool2d(1 - out.mask[None], 3, 1, 1)[0] == 0
    torch.testing.assert_close(out.color[inside], 0.5 + 0.5 * out.normals[inside], atol=1e-6, rtol=0)
